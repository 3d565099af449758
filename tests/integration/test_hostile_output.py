"""What comes out of jobs with tokens and hostile names: neither the terminal nor any file shows a token, or holds what would come to life."""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image

TOKEN = "hf_" + "Ab1" * 11
KNOWN = "opensesame+please"  # a token of another form, which the environment holds
HOSTILE = {
    "markup": "<script>alert(1)</script><img src=x onerror=y>",
    "attribute": "\" onmouseover='alert(1)' x=\"",
    "template": "{{ 7*7 }}{% include 'x' %}",
    "markdown": "a|b](javascript:x) ![c](https://evil.org/d.png) https://evil.org `e`",
    "yaml": "a: !!python/object:os.system\n- b #",
    "rich": "[red]a[/red] [link=https://evil.org]b[/link]",
    "terminal": "a\x1b[2J\x1b]8;;https://evil.org\x1b\\b\x1b]0;c\x07d\re\x9b31m",
    "direction": "a\u202egnp.exe\u2066",
    "formula": "=cmd|' /C calc'!A0",
    "lines": "a\nwritten to /elsewhere (start with report.html)",
}
NAMES = list(HOSTILE.values())
STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f]")


@dataclass(frozen=True)
class Done:
    """A program that has ended."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        return self.out + self.err


def program(*arguments: object, code: str = "", folder: Path | None = None, environment: Mapping[str, str] | None = None) -> Done:
    """The command line in a process of its own.

    Args:
        code: run before it, to break something.
    """
    start = f"{code}\nimport sys\nfrom hf_purify.cli import main\nsys.argv[0] = 'hf-purify'\nmain()"
    quiet = {
        "TQDM_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }  # bars steer the terminal, as they should
    env = os.environ | quiet | dict(environment or {})
    given = [str(a) for a in arguments]
    found = subprocess.run([sys.executable, "-c", start, *given], cwd=folder, env=env, capture_output=True, timeout=240, check=False)
    return Done(found.returncode, found.stdout.decode(errors="replace"), found.stderr.decode(errors="replace"))


def written(folder: Path) -> str:
    """All that lies below a folder: names and content."""
    files = [f for f in sorted(folder.rglob("*")) if f.is_file()]
    return "\n".join(f"{f.relative_to(folder)}\n{f.read_bytes().decode('utf-8', errors='replace')}" for f in files)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier whose classes have hostile names."""
    from transformers import AutoModelForImageClassification, ResNetConfig, ViTImageProcessor

    folder = tmp_path_factory.mktemp("hostile") / "model"
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", id2label=dict(enumerate(NAMES)))
    AutoModelForImageClassification.from_config(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of these classes."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 16, 16, 3), dtype=np.uint8)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    table = {"image": [Image.fromarray(p) for p in pixels], "label": [i % len(NAMES) for i in range(30)]}
    file = tmp_path_factory.mktemp("data") / "clean.parquet"
    datasets.Dataset.from_dict(table, features=features).to_parquet(file)
    return file


def settings(stored: Path) -> list[object]:
    """Of the shortest repair."""
    job = ["--clean", stored, "--test", stored, "--trigger", "badnets", "--samples", 20, "--option", "steps=2"]
    return [*job, "--no-controls", "--device", "cpu", "--seed", 1]


class Tags(HTMLParser):
    """The elements of a page, with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def check_page(text: str) -> None:
    """Raises AssertionError where a page would run, load or open something, or turns what is read."""
    tags = Tags(text).found
    assert not any(tag in ("script", "iframe", "object", "link", "form", "base") for tag, _ in tags)
    for tag, attributes in tags:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        for name in ("src", "srcset", "href", "action"):
            address = attributes.get(name) or "data:"
            assert address.startswith("data:image/png;base64,") or ":" not in address.removeprefix("data:"), address
    assert not STEERING.search(text)


def outside_of_code(card: str) -> str:
    """A card without its code blocks, in which nothing is read as Markdown, and without what the template itself writes as code."""
    text = re.sub(r"^(`{3,})[a-z]*\n.*?^\1$", "", card, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`(?:[\w .-]+|[0-9a-f]{16})`|^!\[[^\]]*\]\(pictures/\w+\.png\)$", "", text, flags=re.MULTILINE)


@pytest.mark.slow
def test_hostile_names_are_dead(checkpoint: Path, stored: Path, tmp_path: Path) -> None:
    model = tmp_path / "a\x1b[2J<script>x<br>[red]\u202e|`]( $(touch owned)"
    model.symlink_to(checkpoint)
    done = program("purify", model, *settings(stored), "-o", tmp_path / "out")
    assert done.code == 0, done.said
    assert not STEERING.search(done.said)
    assert "warning:" in done.out, "the random victim is none"
    report = tmp_path / "out" / "report.html"
    check_page(report.read_text("utf-8"))
    assert html.escape(HOSTILE["rich"]) in report.read_text("utf-8"), "names are shown, as they are"
    samples = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))["samples"]
    assert {s["label"] for s in samples} <= set(NAMES), "JSON keeps names as they are"
    assert not STEERING.search((tmp_path / "out" / "report.json").read_text("utf-8"))
    for line in outside_of_code((tmp_path / "out" / "README.md").read_text("utf-8")).splitlines():
        assert not re.search(r"<\w|(?<!\\)`|(?<!\\)\]\(|https?://", line)
    recipe = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text("utf-8"))
    assert recipe["model"] == str(model)
    shown = program("measure", model, "--test", stored, "--device", "cpu", "--json")
    assert shown.code == 0
    assert not STEERING.search(shown.said)
    assert json.loads(shown.out)["checkpoint"]["source"] == str(model)


@pytest.mark.parametrize("name", NAMES, ids=HOSTILE)
def test_markdown_and_terminal_of_hostile_names(name: str) -> None:
    import io

    from rich.console import Console

    from hf_purify.metrics import Proportion
    from hf_purify.report import Report
    from hf_purify.rows import Row

    row = Row(name, "method", Proportion(1, 2), {name: Proportion(1, 2)}, {name: Proportion(1, 2)}, {name: 0.5})
    report = Report(name, name, rows=[Row("none", "unrepaired", Proportion(1, 2), {name: Proportion(1, 2)}), row], warnings=[name])
    text = report.to_markdown()
    assert not re.search(r"<\w|(?<!\\)`|(?<!\\)\]\(|(?<!\\)://", text)
    assert not STEERING.search(text)
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines()}) == 1, "a table keeps its columns"
    console = Console(width=120, file=io.StringIO(), force_terminal=True, color_system=None)
    console.print(report.table())
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert not STEERING.search(re.sub(r"\x1b\[\d*m", "", shown)), "rich's own styles apart"
    check_page(report.to_html())


ERRORS = {
    "a model": (["measure", f"https://me:{TOKEN}@host/me/x", "--test", "x"], 2),
    "a model that the environment's token names": (["measure", f"./{KNOWN}", "--test", "x"], 2),
    "data": (["purify", "MODEL", "--clean", f"https://127.0.0.1:9/x.parquet?token={TOKEN}"], 2),
    "a method": (["purify", "MODEL", "--clean", "x", "--method", TOKEN], 2),
    "an option": (["purify", "MODEL", "--clean", "x", "--option", f"token={TOKEN}"], 2),
    "a number": (["purify", "MODEL", "--clean", "x", "--samples", f"{TOKEN}\x1b[2J"], 2),
    "a flag": (["purify", "MODEL", f"--{TOKEN}\x1b[2J"], 2),
    "an argument": (["list", "methods", f"{TOKEN}\x1b[2J\x07"], 2),
    "a command": ([f"{TOKEN}\x1b[2J"], 2),
    "a recipe": (["purify", "--recipe", f"/nowhere/{TOKEN}\x1b[2J\n\u202eerror.yaml"], 2),
}


@pytest.mark.parametrize(("arguments", "code"), ERRORS.values(), ids=ERRORS)
def test_errors_show_no_token_and_steer_nothing(arguments: list[str], code: int, checkpoint: Path, tmp_path: Path) -> None:
    given = [str(checkpoint) if a == "MODEL" else a for a in arguments]
    done = program(*given, folder=tmp_path, environment={"HF_TOKEN": KNOWN})
    assert done.code == code, done.said
    assert done.err
    assert TOKEN not in done.said
    assert KNOWN not in done.said
    assert not STEERING.search(done.said)
    assert "Traceback" not in done.said
    assert not list(tmp_path.iterdir())


DEFECT = f"""
import logging, warnings
import hf_purify.purifier as purifier
def broken(recipe):
    secret = {TOKEN!r}
    warnings.warn(f"warned of {TOKEN}\\x1b[2J")
    logging.getLogger("huggingface_hub.file_download").warning("GET https://host/x?token=%s\\x1b[2J", secret)
    logging.getLogger("transformers").error("with {KNOWN}")
    try:
        raise OSError("https://me:" + secret + "@host/x")
    except OSError as error:
        raise RuntimeError("with {KNOWN} and " + secret + "\\x1b[2J") from error
purifier.run_measure = broken
"""


def test_a_defect_shows_where_and_no_token() -> None:
    """Neither in its messages, nor in what was logged before; its code is 1."""
    done = program("measure", "x", "--test", "y", code=DEFECT, environment={"HF_TOKEN": KNOWN})
    assert done.code == 1
    assert "Traceback (most recent call last)" in done.err
    assert "RuntimeError: with [hidden] and [hidden]" in done.err
    assert "OSError: https://[hidden]@host/x" in done.err
    assert "warned of [hidden]" in done.err
    assert "GET https://host/x?token=[hidden]" in done.err
    assert TOKEN not in done.said
    assert KNOWN not in done.said
    assert not STEERING.search(done.said)


@pytest.mark.slow
def test_files_of_a_job_hold_no_token(checkpoint: Path, stored: Path, tmp_path: Path) -> None:
    """Of the environment, of a login, and in names that were given."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text("stored-by-a-login\n")
    data = tmp_path / f"data_{TOKEN}_{KNOWN}_stored-by-a-login.parquet"
    data.symlink_to(stored)
    environment = {"HF_TOKEN": KNOWN, "HF_HOME": str(tmp_path / "home")}
    done = program("purify", checkpoint, *settings(data), "-o", tmp_path / "out", environment=environment)
    assert done.code == 0, done.said
    found = written(tmp_path / "out") + done.said
    assert "data_[hidden]_[hidden]_[hidden].parquet" in found
    for secret in (TOKEN, KNOWN, "stored-by-a-login"):
        assert secret not in found


def test_a_sweep_refuses_tokens_and_escapes_names(tmp_path: Path) -> None:
    (tmp_path / "models.txt").write_text(f"https://me:{TOKEN}@host/me/x\n")
    done = program("sweep", "models.txt", "clean=x", folder=tmp_path)
    assert done.code == 2
    assert "line 1 of 'models.txt': its settings hold a token or a password" in done.err
    assert [p.name for p in tmp_path.iterdir()] == ["models.txt"]
    hostile = "./" + (HOSTILE["markup"] + HOSTILE["direction"]).replace(" ", "_")
    (tmp_path / "models.txt").write_text(f"'{hostile}\x1b[2J'\n", "utf-8")
    done = program("sweep", "models.txt", "clean=x", "device=cpu", folder=tmp_path, environment={"HF_TOKEN": KNOWN})
    assert done.code == 6, done.said
    assert not STEERING.search(done.said)
    page = (tmp_path / "sweep" / "sweep.html").read_text("utf-8")
    check_page(page)
    assert "&lt;script&gt;" in page
    assert not list(tmp_path.rglob("*.csv")), "no table that a spreadsheet would compute"
