"""The page in a real browser: a repair from its fields to its zip, stops, errors, hostile names, and what the server lets in."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import psutil
import pytest
import timm
from safetensors.torch import load_file

from hf_purify_adapters.vision.demo import TRIGGER

pytest.importorskip("gradio", reason="needs gradio: pip install 'hf-purify[ui]'")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs a chromium on the PATH")]

# What gradio's own client says when a page is left or loaded again while it is being sent something.
OF_GRADIO = re.compile(r"BodyStreamBuffer was aborted|[Cc]onnection errored out|network error")
HOSTILE = "<img src=x onerror=alert(1)>${alert(2)}{{alert(3)}}**b**"


@dataclass
class Server:
    """A running `hf-purify ui`."""

    address: str
    port: int
    folder: Path
    process: subprocess.Popen[str]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def begin(folder: Path, log: Path, **variables: str) -> Server:
    port = free_port()
    command = [sys.executable, "-m", "hf_purify", "ui", "--port", str(port), "--folder", str(folder)]
    with log.open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, text=True, env=os.environ | variables)
    end = time.monotonic() + 90
    while "hf-purify is at" not in log.read_text("utf-8"):
        assert process.poll() is None, log.read_text("utf-8")
        assert time.monotonic() < end, log.read_text("utf-8")
        time.sleep(0.1)
    return Server(f"http://127.0.0.1:{port}", port, folder, process)


def finish(server: Server) -> int:
    server.process.send_signal(signal.SIGTERM)
    try:
        return server.process.wait(60)
    finally:
        server.process.kill()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("ui")
    served = begin(folder / "work", folder / "log", CUDA_VISIBLE_DEVICES="")
    yield served
    code = finish(served)
    said = (folder / "log").read_text("utf-8")
    assert code == 143, said
    assert "Traceback" not in said, said
    assert [f.name for f in (folder / "work").iterdir() if f.name.startswith(".")] == []


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(server: Server, browser: Any) -> Iterator[Any]:
    """A page of a visitor of its own, which must not complain, show a dialog, or ask anybody but the server."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    page = context.new_page()
    page.set_default_timeout(30_000)
    complaints: list[str] = []
    page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: (complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda asked: complaints.append(asked.url) if not asked.url.startswith((server.address, "data:", "blob:")) else None)
    page.goto(server.address)
    status(page).wait_for()
    yield page
    assert [said for said in complaints if not OF_GRADIO.search(said)] == []
    context.close()


def status(page: Any) -> Any:
    return page.locator("#status").locator("[role=status], [role=alert]")


def says(page: Any, pattern: str, seconds: float = 60) -> None:
    playwright.expect(status(page)).to_have_text(re.compile(pattern), timeout=seconds * 1000)


def fill(page: Any, model: object, clean: object, samples: int = 40) -> None:
    page.get_by_role("textbox", name="Model").fill(str(model))
    page.get_by_role("textbox", name="Clean data").fill(str(clean))
    page.get_by_role("spinbutton", name="Clean samples").fill(str(samples))


def tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def press(page: Any, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def choose(page: Any, method: str, settings: str = "") -> None:
    tab(page, "Repair")
    page.get_by_role("combobox", name="Method").click()
    page.get_by_role("option", name=method, exact=True).click()
    page.get_by_role("textbox", name="Settings").fill(settings)


def fetch(page: Any, name: str | re.Pattern[str], to: Path) -> Path:
    button = page.get_by_role("button", name=name)
    playwright.expect(button).to_be_enabled()
    with page.expect_download() as begun:
        button.click()
    begun.value.save_as(to / begun.value.suggested_filename)
    return to / begun.value.suggested_filename


def test_repair_from_the_fields_to_the_zip(page: Any, server: Server, victim: Path, stored: Path, tmp_path: Path) -> None:
    fill(page, victim, stored / "parquet" / "train.parquet")
    choose(page, "nft", "steps=60\nbatch_size=16")
    press(page, "I know the trigger \u25bc")
    page.get_by_role("textbox", name="Test data").fill(str(stored / "parquet" / "test.parquet"))
    page.get_by_role("textbox", name="Trigger").fill(TRIGGER)
    press(page, "Repair")
    says(page, "^Repair: running")
    playwright.expect(page.get_by_role("button", name="Repair", exact=True)).to_be_disabled()
    says(page, r"^Repair: done in \d+ s, written to .*repair$")

    rows = page.get_by_role("table", name="Before and after the repair").get_by_role("row")
    report = json.loads((server.folder / "repair" / "report.json").read_text("utf-8"))
    assert rows.count() == len(report["rows"]) + 1
    before = next(row for row in report["rows"] if row["kind"] == "unrepaired")
    shown = rows.filter(has_text="none (unrepaired)").inner_text()
    assert f"{100 * before['asr']['badnets']['value']:.1f}\u00a0%" in shown
    inside = page.frame_locator("iframe[title='Report of the repair']")
    assert inside.get_by_role("heading", name="Before and after").is_visible()
    assert page.locator("iframe").get_attribute("sandbox") == ""

    assert fetch(page, "Download the report", tmp_path).read_text("utf-8") == (server.folder / "repair" / "report.html").read_text("utf-8")
    press(page, "Pack the repaired checkpoint")
    packed = fetch(page, re.compile(r"^Download repair\.zip \(\d"), tmp_path)
    zipfile.ZipFile(packed).extractall(tmp_path)
    weights = load_file(tmp_path / "repair" / "model.safetensors")
    assert weights.keys() == load_file(victim / "model.safetensors").keys()
    assert timm.create_model(f"local-dir:{tmp_path / 'repair'}", pretrained=True).num_classes == 10

    page.reload()
    says(page, "^Repair: done")
    assert page.get_by_role("textbox", name="Model").input_value() == str(victim)
    tab(page, "Compare")
    assert page.get_by_role("table", name="Before and after the repair").is_visible()
    playwright.expect(page.get_by_role("button", name="Scan again")).to_be_enabled()


def test_a_run_that_is_stopped(page: Any, server: Server, victim: Path, stored: Path) -> None:
    """It goes on over a reload of the page; another visitor's run waits for it."""
    there = sorted(f.name for f in server.folder.iterdir())
    fill(page, victim, stored / "parquet" / "train.parquet")
    choose(page, "nft", "steps=5000")
    press(page, "Repair")
    says(page, r"^Repair: NFT, \d+ %")
    shown = [int(page.locator("#status progress").get_attribute("value"))]
    playwright.expect(page.locator("#status progress")).not_to_have_attribute("value", str(shown[0]), timeout=60_000)
    shown.append(int(page.locator("#status progress").get_attribute("value")))
    assert shown == sorted(shown)
    assert re.match(r"\d+/5000 \[", page.locator("#status .hp-detail").inner_text())
    child = psutil.Process(server.process.pid).children()
    assert len(child) == 1
    page.reload()
    says(page, r"^Repair: NFT, \d+ %")
    other = page.context.browser.new_context()
    visitor = other.new_page()
    visitor.goto(server.address)
    fill(visitor, victim, stored / "parquet" / "train.parquet")
    tab(visitor, "Repair")
    press(visitor, "Repair")
    says(visitor, "^Repair: waiting for one run before it")
    press(visitor, "Stop")
    says(visitor, "^Repair: stopped")
    other.close()
    press(page, "Stop")
    says(page, "^Repair: stopped; nothing was left half-written")
    playwright.expect(page.get_by_role("button", name="Stop")).to_be_disabled()
    assert not child[0].is_running()
    assert sorted(f.name for f in server.folder.iterdir()) == there


def test_bad_input_is_said_in_words(page: Any, tmp_path: Path, stored: Path) -> None:
    tab(page, "Repair")
    press(page, "Repair")
    says(page, "no model given; expected a checkpoint folder")
    fill(page, tmp_path / f"--{HOSTILE}".replace("/", "_"), stored / "parquet" / "train.parquet")
    press(page, "Repair")
    says(page, r"Repair failed\.")
    shown = status(page).inner_text()
    assert HOSTILE.replace("/", "_") in shown, "a name is text, and nothing in it is markup"
    assert "exit code" not in shown
    assert page.locator("#status img").count() == 0
    playwright.expect(page.get_by_role("button", name="Repair", exact=True)).to_be_enabled()


def test_hostile_names_are_text(page: Any, victim: Path, data: Any, tmp_path: Path) -> None:
    """Those of a model and of its classes, in what is said of the run and in the report inside the page."""
    model = tmp_path / HOSTILE.replace("/", "_")
    shutil.copytree(victim, model)
    config = json.loads((model / "config.json").read_text("utf-8"))
    config["label_names"] = names = [f"{HOSTILE}{k}" for k in range(10)]
    (model / "config.json").write_text(json.dumps(config), "utf-8")
    for part, split in zip(("train", "test"), data, strict=True):
        split.cast_column("label", datasets.ClassLabel(names=names)).to_parquet(tmp_path / f"{part}.parquet")
    fill(page, model, tmp_path / "train.parquet")
    choose(page, "random_mask")
    page.get_by_role("checkbox", name="Show controls").uncheck()
    press(page, "I know the trigger \u25bc")
    page.get_by_role("textbox", name="Test data").fill(str(tmp_path / "test.parquet"))
    page.get_by_role("textbox", name="Trigger").fill(TRIGGER)
    press(page, "Repair")
    says(page, "^Repair: done")
    inside = page.frame_locator("iframe[title='Report of the repair']")
    assert model.name in inside.get_by_role("heading", level=1).inner_text()
    assert inside.get_by_text(f"{HOSTILE}3").count() > 0
    assert inside.locator("img[src=x]").count() == 0


def test_keyboard_alone(page: Any) -> None:
    """Every field and button can be reached by the Tab key, and has a name."""
    tab(page, "Repair")
    page.get_by_role("textbox", name="Model").focus()
    names = []
    for _ in range(18):
        names.append(
            page.evaluate(
                "(document.activeElement.labels?.[0] ?? document.activeElement).innerText || document.activeElement.ariaLabel || ''"
            )
        )
        if names[-1].strip() == "Repair":
            break
        page.keyboard.press("Tab")
    reached = " | ".join(names)
    for name in ("Model", "Clean data", "Clean samples", "Split", "Log", "Settings of the method", "Show controls", "I know the trigger"):
        assert name in reached
    page.keyboard.press("Enter")
    says(page, "no model given")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_screens(page: Any, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 400, "height": 800})
    for name in ("Scan", "Repair", "Compare"):
        tab(page, name)
        assert page.evaluate("document.documentElement.scrollWidth") <= 400


def test_who_is_let_in(server: Server) -> None:
    listening = {c.laddr.ip for c in psutil.Process(server.process.pid).net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}

    def asked(path: str, data: bytes | None = None, **headers: str) -> int:
        request = urllib.request.Request(server.address + path, data, {k.replace("_", "-"): v for k, v in headers.items()})
        try:
            return int(urllib.request.urlopen(request, timeout=30).status)
        except urllib.error.HTTPError as error:
            return error.code

    event = json.dumps({"data": [{}], "fn_index": 0, "session_hash": "a"}).encode()
    assert asked("/") == 200
    assert asked("/", Host="evil.org") == 400
    assert asked("/gradio_api/queue/join", event, Content_Type="application/json", Sec_Fetch_Site="cross-site") == 403
    assert asked("/gradio_api/upload", b"", Content_Type="multipart/form-data; boundary=a", Sec_Fetch_Site="same-site") == 403
    for file in (Path(__file__), server.folder / "repair" / "report.json", Path("/etc/passwd")):
        assert asked(f"/gradio_api/file={file}") in (403, 404)
    with urllib.request.urlopen(f"{server.address}/gradio_api/info", timeout=30) as answer:
        assert json.load(answer) == {"named_endpoints": {}, "unnamed_endpoints": {}}


def test_scan_repair_and_scan_again(page: Any, server: Server, victim: Path, stored: Path) -> None:
    fill(page, victim, stored / "parquet" / "train.parquet", 100)
    press(page, "Scan")
    says(page, r"^Scan: done", 120)
    found = json.loads((server.folder / "scan" / "scan.json").read_text("utf-8"))
    assert found["suspicious"]
    assert page.frame_locator("iframe[title='What the scan found']").locator("h1").is_visible()
    choose(page, "nft")
    page.get_by_role("checkbox", name="Begin with what the scan found").check()
    press(page, "Repair")
    says(page, "nft makes no use of a scan", 120)
    choose(page, "rnp", "recover_epochs=2")
    press(page, "Repair")
    says(page, "^Repair: done", 120)
    tab(page, "Compare")
    press(page, "Scan again")
    says(page, "^Second scan: done", 120)
    both = page.get_by_role("table", name="The two scans")
    assert both.get_by_role("columnheader").all_inner_texts()[1:] == ["Before the repair", "After the repair"]
    assert f"{found['score']:.3f}" in both.inner_text()


def test_a_space_listens_to_the_world(tmp_path: Path) -> None:
    """And is reached under any name, as behind the Hub's proxy."""
    served = begin(tmp_path / "work", tmp_path / "log", SPACE_ID="me/hf-purify", CUDA_VISIBLE_DEVICES="")
    try:
        listening = {c.laddr.ip for c in psutil.Process(served.process.pid).net_connections("tcp") if c.status == psutil.CONN_LISTEN}
        assert listening == {"0.0.0.0"}
        request = urllib.request.Request(served.address, headers={"Host": "me-hf-purify.hf.space"})
        assert urllib.request.urlopen(request, timeout=30).status == 200
    finally:
        assert finish(served) == 143
