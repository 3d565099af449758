"""The pages in a real browser: silent, self-contained, readable in every light and width, on paper, and with a keyboard alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from diagnoses import make_diagnosis
from papers import report_of
from pdf_text import as_printed, text_of

from hf_purify.diagnosis import Diagnosis
from hf_purify.metrics import Proportion
from hf_purify.neurons import NeuronGroup, ParamSlice
from hf_purify.report import NeuronLayer, Report, Sample
from hf_purify.rows import Row

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

HOSTILE = "<img src=x onerror=alert(1)>\u202e[a](b)" + "wide" * 50
SCHEMES = ("light", "dark")


def thousand_classes() -> Diagnosis:
    found = make_diagnosis()
    found.labels = [f"class number {i}" for i in range(1000)]
    for i, signal in enumerate(found.signals[:3]):
        signal.values = np.random.default_rng(i).normal(size=1000).tolist()
        signal.values[5] = signal.line = 4.0
    return found


def two_classes() -> Diagnosis:
    found = make_diagnosis(text=True)
    found.labels, found.targets = ["negative", "positive"], [1]
    for signal in found.signals[:3]:
        signal.values = signal.values[4:6]
    return found


def full_report(triggers: tuple[str, ...] = ("badnets",), hostile: str = "") -> Report:
    """A report with all its parts: rows, notes, samples, curve, masks, scores and changes."""
    group = NeuronGroup(f"layer1.bn1{hostile}", 64, (ParamSlice("layer1.bn1.weight", 0),), "norm")
    scores = torch.linspace(-1, 3, 64)
    sample = Sample(
        triggers[0], f"cat{hostile}", "dog", "cat", "cat", "dog", "cat", *[np.full((32, 32, 3), c, np.uint8) for c in (90, 200)]
    )
    rows = [
        Row("none", "unrepaired", Proportion(190, 200), {t: Proportion(176, 180) for t in triggers}),
        Row(f"rnp{hostile}", "method", Proportion(189, 200), {t: Proportion(5, 180) for t in triggers}, notes={"threshold": 0.35}),
    ]
    return report_of(
        title=f"rnp on some-org/model{hostile}",
        rows=rows,
        layers=[NeuronLayer.of(group, (scores < 2.5).float(), scores, 0.2)] * 3,
        curve=[{"threshold": t / 10, "removed": t, "held_out_accuracy": 0.9 - t / 20} for t in range(11)],
        curve_chosen=0.3,
        samples=[sample] * 3,
    )


def written_report() -> Report:
    sample = Sample("words", "positive", "negative", "positive", "positive", "negative", "positive", triggered_text="a cf film " * 90)
    return report_of(samples=[sample])


PAGES: dict[str, Callable[[], Report | Diagnosis]] = {
    "report": full_report,
    "report of several triggers": lambda: full_report(("badnets", "wanet", "sig")),
    "report of words": written_report,
    "hostile report": lambda: full_report(hostile=HOSTILE),
    "scan of a clean model": lambda: make_diagnosis("none"),
    "scan": make_diagnosis,
    "scan of several targets": lambda: make_diagnosis("multi-target"),
    "scan of a text model": two_classes,
    "scan of a thousand classes": thousand_classes,
    "scan without a score": lambda: make_diagnosis("unjudged"),
    "hostile scan": lambda: make_diagnosis(hostile=HOSTILE),
    "hostile scan of a text model": lambda: make_diagnosis("multi-target", True, HOSTILE),
}

# Every visible text with the contrast of its colour to what lies behind it, after WCAG 2.2 (relative luminance).
CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = color => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255]; };
  const over = (top, below) => top.slice(0, 3).map((v, i) => v * top[3] + below[i] * (1 - top[3]));
  const behind = node => { if (!node) return rgba(matchMedia("(prefers-color-scheme: dark)").matches ? "#121212" : "#fff").slice(0, 3);
    const own = rgba(getComputedStyle(node).backgroundColor); return own[3] === 1 ? own.slice(0, 3) : over(own, behind(node.parentElement)); };
  const light = color => color.map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement, style = getComputedStyle(node), back = behind(node);
    if (!walker.currentNode.data.trim() || !node.checkVisibility({ visibilityProperty: true }) || style.clipPath !== "none") continue;
    const [a, b] = [light(over(rgba(style.color), back)), light(back)].sort((x, y) => y - x);
    found.push({ text: walker.currentNode.data.trim().slice(0, 60), ratio: (a + .05) / (b + .05), opacity: style.opacity });
  }
  return found;
}"""
STOPS = "summary, a[href], button, input, [tabindex='0']"
FOCUSED = """() => {
  const node = document.activeElement, style = getComputedStyle(node), box = node.getBoundingClientRect();
  return { index: [...document.querySelectorAll(STOPS)].indexOf(node), ring: style.outlineStyle !== "none" && parseFloat(style.outlineWidth) > 0,
    seen: box.bottom > 0 && box.top < innerHeight && box.width > 0, details: node.localName === "summary" };
}""".replace("STOPS", f'"{STOPS}"')
CUT_OFF = """() => [...document.querySelectorAll("body *")].filter(node => {
  const box = node.getBoundingClientRect();
  return box.width > 1 && box.right > innerWidth + 1 && !node.closest(".scroll, picture");
}).map(node => node.outerHTML.slice(0, 120))"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[dev]'")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("needs Chromium: there is no chromium, chromium-browser or google-chrome on the PATH")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Each page as a file, made once."""
    folder = tmp_path_factory.mktemp("pages")

    def file(name: str) -> Path:
        path = folder / f"{name}.html"
        if not path.is_file():
            path.write_text(PAGES[name]().to_html(), "utf-8")
        return path

    return file


@pytest.fixture(params=PAGES)
def path(request: pytest.FixtureRequest, files: Callable[[str], Path]) -> Path:
    return files(request.param)


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    with browser.new_context(viewport={"width": 1200, "height": 800}) as context:
        yield context


def opened(context: BrowserContext, path: Path, scheme: str = "light", width: int = 1200) -> tuple[Page, list[str]]:
    """The page, and what it said and asked for."""
    page, heard = context.new_page(), []
    page.on("console", lambda message: heard.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: heard.append(f"error: {error}"))
    page.on("dialog", lambda dialog: heard.append(f"dialog: {dialog.message}"))
    page.on("request", lambda request: request.url.startswith("data:") or heard.append(f"request: {request.url}"))
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(path.as_uri())
    return page, heard


def test_is_silent_and_loads_nothing(context: BrowserContext, path: Path) -> None:
    page, heard = opened(context, path)
    assert heard == [f"request: {path.as_uri()}"]
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert page.evaluate("document.scripts.length") == 0
    assert path.stat().st_size < 2_000_000


def test_has_a_title_and_an_outline(context: BrowserContext, path: Path) -> None:
    page, _ = opened(context, path)
    assert page.title() == page.locator("h1").inner_text()
    assert page.locator("html").get_attribute("lang") == "en"
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3, h4, h5, h6')].map(h => +h.localName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    assert page.evaluate("[...document.images].every(i => i.alt.trim())")
    assert page.evaluate(
        "[...document.querySelectorAll('[aria-labelledby], [aria-describedby]')].every(n => "
        "document.getElementById(n.getAttribute('aria-labelledby') ?? n.getAttribute('aria-describedby')))"
    )
    assert page.evaluate("(ids => new Set(ids).size === ids.length)([...document.querySelectorAll('[id]')].map(n => n.id))")


@pytest.mark.parametrize("width", [320, 400])
def test_fits_narrow_screens(context: BrowserContext, path: Path, width: int) -> None:
    page, _ = opened(context, path, width=width)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(CUT_OFF) == []


@pytest.mark.parametrize("scheme", SCHEMES)
def test_texts_stand_out(context: BrowserContext, path: Path, scheme: str) -> None:
    page, _ = opened(context, path, scheme)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    texts: list[dict[str, Any]] = page.evaluate(CONTRASTS)
    assert len(texts) > 40
    assert [t for t in texts if t["ratio"] < 4.5 or t["opacity"] != "1"] == []


def test_themes_differ(context: BrowserContext, path: Path) -> None:
    papers = [opened(context, path, scheme)[0].evaluate("getComputedStyle(document.body).backgroundColor") for scheme in SCHEMES]
    assert papers == ["rgb(244, 246, 248)", "rgb(13, 17, 23)"]


@pytest.mark.parametrize("width", [400, 1200])
def test_a_keyboard_reaches_and_opens_everything(context: BrowserContext, path: Path, width: int) -> None:
    page, _ = opened(context, path, width=width)
    count, visited = page.locator(STOPS).count(), []
    for _ in range(count):
        page.keyboard.press("Tab")
        focused = page.evaluate(FOCUSED)
        visited.append(focused["index"])
        assert focused["ring"], f"stop {focused['index']} shows no focus"
        assert focused["seen"], f"stop {focused['index']} is out of sight"
        if focused["details"]:
            was = page.evaluate("document.activeElement.parentElement.open")
            for expected in (False, True) if was else (True,):  # and it stays open: what is in it comes next
                page.keyboard.press("Enter")
                assert page.evaluate("document.activeElement.parentElement.open") == expected
    assert sorted(visited) == list(range(count))


def test_what_scrolls_is_a_stop_of_the_keyboard(context: BrowserContext, path: Path) -> None:
    """Not only in browsers that make it one themselves."""
    page, _ = opened(context, path, width=320)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    stuck = page.evaluate("""[...document.querySelectorAll("body *")].filter(n => n.scrollWidth > n.clientWidth + 1 && n.tabIndex < 0
      && ["auto", "scroll"].includes(getComputedStyle(n).overflowX)).map(n => n.outerHTML.slice(0, 120))""")
    assert stuck == []


@pytest.mark.parametrize("scheme", SCHEMES)
def test_prints_on_white_paper_with_its_verdict(context: BrowserContext, path: Path, scheme: str) -> None:
    page, _ = opened(context, path, scheme)
    verdict = page.locator(".verdict").inner_text()
    printed = text_of(page.pdf(format="A4", margin=dict.fromkeys(("top", "right", "bottom", "left"), "15mm")))
    assert as_printed(verdict) in printed
    page.emulate_media(media="print", color_scheme=scheme)  # type: ignore[arg-type]
    page.set_viewport_size({"width": 680, "height": 1000})  # A4 less its margins
    assert page.evaluate("document.documentElement.scrollWidth") <= 680
    assert [t for t in page.evaluate(CONTRASTS) if t["ratio"] < 4.5] == []
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(28, 36, 48)"


def test_paper_has_what_a_click_would_open(context: BrowserContext, files: Callable[[str], Path]) -> None:
    page, _ = opened(context, files("scan"))
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = false)")
    assert "layer3.0.bn2(norm)1,3,43" in text_of(page.pdf(format="A4"))
