"""What the buttons of the page do, without a browser: a stand-in for the command line writes what a scan writes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="needs gradio: pip install 'hf-purify[ui]'")

import gradio as gr

from hf_purify.diagnosis import Diagnosis
from hf_purify.ui import runs
from hf_purify.ui.app import Events
from hf_purify.ui.layout import draw

STANDIN = """
import pathlib, sys
given = dict(a[2:].split("=", 1) for a in sys.argv if a.startswith("--") and "=" in a)
out = pathlib.Path(given["output"])
print(*sys.argv[1:], file=sys.stderr)
if sys.argv[1] == "purify":
    sys.exit("error: no repair today")
again = "repair" in sys.argv[-1]
out.mkdir()
(out / "scan.json").write_text(pathlib.Path(__file__).with_name("clean.json" if again else "found.json").read_text())
(out / "report.html").write_text("<h1>a page</h1>")
sys.exit(0 if again else 3)
"""
FOUND = Diagnosis("t", "image-classification", True, 0.991, kind="single-target", targets=[0], labels=["<b>cat</b>", "dog"], neurons=10)
CLEAN = Diagnosis("t", "image-classification", False, 0.25, labels=["<b>cat</b>", "dog"], neurons=10)


@pytest.fixture
def events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Events]:
    folder = tmp_path / "standin" / "hf_purify"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "__main__.py").write_text(STANDIN)
    (folder / "found.json").write_text(FOUND.to_json(pixels=True), "utf-8")
    (folder / "clean.json").write_text(CLEAN.to_json(pixels=True), "utf-8")
    monkeypatch.setenv("PYTHONPATH", str(folder.parent))
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "cache"))
    work = tmp_path / "work"
    work.mkdir()
    made = runs.Runs(work)
    with gr.Blocks(analytics_enabled=False):
        yield Events(draw(), made)
    made.close()


def press(button: Any, events: Events, session: dict[str, Any], **given: Any) -> dict[Any, Any]:
    """What the page shows at the end, with `session` as the browser would keep it."""
    page = events.page
    fields = {**vars(page.inputs), **vars(page.repair), "suspects": page.scan.suspects}
    values = {field: getattr(field, "value", None) for field in fields.values()} | {page.session: session}
    values |= {fields[name]: value for name, value in ({"model": "net", "clean": "data"} | given).items()}

    async def follow() -> dict[Any, Any]:
        shown: dict[Any, Any] = {}
        async for update in button(values):
            shown |= update
        return shown

    shown = asyncio.run(follow())
    session.update(shown.get(page.session, {}))
    return shown


def test_a_scan_and_a_second_one_beside_it(events: Events, tmp_path: Path) -> None:
    page, session = events.page, {}
    shown = press(events.scan, events, session, suspects="more")
    assert "Scan: done" in shown[page.panel.status]
    assert "scan --clean=data --samples=500" in shown[page.panel.log]
    assert shown[page.panel.log].endswith("--suspects=more -- net")
    assert FOUND.verdict.startswith("Suspicious")
    assert "hp-alarm" in shown[page.scan.result]
    assert "&lt;b&gt;cat" in shown[page.scan.result]
    assert "<b>" not in shown[page.scan.result]
    assert 'srcdoc="&lt;h1&gt;a page' in shown[page.scan.result]
    assert Path(shown[page.scan.findings]["value"]).is_relative_to(tmp_path / "cache")
    assert shown[page.repair.begin]["interactive"]
    assert not shown[page.compare.button]["interactive"]

    repaired = events.runs.start("repair", "net", lambda out: [])
    assert repaired.wait(30)
    shown = press(events.again, events, session | {"repair": repaired.name})
    assert "Second scan: done" in shown[page.panel.status]
    both = shown[page.compare.scans]
    assert both.index("0.991") < both.index("0.250")
    assert "<td>suspicious</td><td>nothing found</td>" in both


def test_a_repair_that_begins_with_the_scan(events: Events) -> None:
    session: dict[str, Any] = {}
    press(events.scan, events, session)
    shown = press(events.repair, events, session, begin=True)
    assert f"--from-scan={events.runs.folder / 'scan'}" in shown[events.page.panel.log]
    assert "no repair today" in shown[events.page.panel.status]
    shown = press(events.repair, events, session, begin=True, model="other")
    assert "the scan is one of &#39;net&#39;" in shown[events.page.panel.status]


@pytest.mark.parametrize("session", [None, [], "x", {"current": {"a": 1}, "scan": 3, "given": 7}, {"current": "unknown"}])
def test_whatever_the_browser_kept(events: Events, session: Any) -> None:
    async def load() -> dict[Any, Any]:
        return {k: v for update in [u async for u in events.resume(session)] for k, v in update.items()}

    shown = asyncio.run(load())
    assert shown[events.page.scan.result] == ""
    assert shown[events.page.scan.button]["interactive"]
