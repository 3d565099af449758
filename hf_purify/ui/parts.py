"""Parts of the page as HTML. Whatever a model, a data set or a run says is text in them: escaped, on one line, without tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from markupsafe import Markup, escape

from hf_purify.diagnosis import Diagnosis
from hf_purify.redaction import lines, one_line
from hf_purify.rendering import grid
from hf_purify.report import Report
from hf_purify.ui.runs import DONE, FAILED, RUNNING, STOPPED, WAITING, Run

DASH = "\u2013"
WORDS = {"scan": "Scan", "repair": "Repair", "again": "Second scan"}
IDLE = Markup('<p class="hp-status" role="status">Nothing runs.</p>')


def text(value: object) -> Markup:
    """A value as it may stand in a page."""
    return escape(one_line(str(value)))


def status(run: Run | None, ahead: int = 0) -> Markup:
    """How it stands with a run, with its progress."""
    if run is None:
        return IDLE
    what = WORDS[run.kind]
    if run.state == WAITING:
        before = f"{ahead} runs before it" if ahead > 1 else "one run before it" if ahead else "its turn"
        return _status("busy", f"{what}: waiting for {before}.") + Markup("<progress aria-label='Progress'></progress>")
    if run.state == RUNNING:
        return _running(run, what)
    if run.state == FAILED:
        return refused(run.error, f"{what} failed.")
    said = {
        DONE: f"{what}: done in {run.seconds:.0f} s, written to {run.output}",
        STOPPED: f"{what}: stopped; nothing was left half-written.",
    }
    return _status(run.state, said[run.state])


def _running(run: Run, what: str) -> Markup:
    bar = run.screen.bar
    if run.stopping:
        return _status("busy", f"{what}: stopping ...") + Markup("<progress aria-label='Progress'></progress>")
    if bar is None:
        return _status("busy", f"{what}: running ...") + Markup("<progress aria-label='Progress'></progress>")
    title = f"{what}: {bar.title}, {bar.percent} %" if bar.title else f"{what}: {bar.percent} %"
    drawn = Markup('<progress aria-label="Progress" max="100" value="{}"></progress>').format(bar.percent)
    return _status("busy", title) + drawn + Markup('<p class="hp-detail">{}</p>').format(text(bar.detail))


def _status(kind: str, said: str) -> Markup:
    return Markup('<p class="hp-status hp-{}" role="status">{}</p>').format(kind, text(said))


def refused(message: str, heading: str = "This cannot be run.") -> Markup:
    """An error, in the words of the command line."""
    shown = escape(lines(message))
    return Markup('<div class="hp-error" role="alert"><strong>{}</strong><pre>{}</pre></div>').format(heading, shown)


def sentence(said: str, alarming: bool = False) -> Markup:
    """A verdict."""
    return Markup('<p class="hp-verdict{}">{}</p>').format(" hp-alarm" if alarming else "", text(said))


def frame(page: Path, title: str) -> Markup:
    """A page that a run wrote, in a frame in which no script runs and which reaches nothing."""
    return Markup('<iframe class="hp-frame" sandbox="" title="{}" srcdoc="{}"></iframe>').format(title, page.read_text("utf-8"))


def before_and_after(report: Report) -> Markup:
    """The table of a repair, each figure with its interval."""
    heads, rows = grid(report)
    flat = [[str(cell) for cell in line] for _, found in rows for line in found]
    return _table("Before and after the repair", heads, flat)


def side_by_side(first: Diagnosis | None, second: Diagnosis | None) -> Markup:
    """The scan of the model beside that of its repair."""
    found = [d for d in (first, second) if d is not None]
    heads = ["", *["Before the repair"] * (first is not None), *["After the repair"] * (second is not None)]
    rows = [[name, *(_fact(name, d) for d in found)] for name in ("Verdict", "Score", "Kind", "Target labels", "Suspected neurons")]
    said = Markup("").join(
        Markup("<h3>{}</h3>").format(head) + sentence(d.verdict, d.suspicious) for head, d in zip(heads[1:], found, strict=True)
    )
    return said + _table("The two scans", heads, rows)


def _fact(name: str, found: Diagnosis) -> str:
    targets = ", ".join(found.name_of(t) for t in found.targets)
    return {
        "Verdict": "suspicious" if found.suspicious else "no score" if math.isnan(found.score) else "nothing found",
        "Score": DASH if math.isnan(found.score) else f"{found.score:.3f} (suspicious above {found.threshold:g})",
        "Kind": found.kind,
        "Target labels": targets or DASH,
        "Suspected neurons": f"{found.suspected:,} of {found.neurons:,}",
    }[name]


def _table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Markup:
    top = Markup("").join(Markup('<th scope="col">{}</th>').format(text(h)) for h in heads)
    lines = Markup("").join(
        Markup('<tr><th scope="row">{}</th>{}</tr>').format(
            text(first), Markup("").join(Markup("<td>{}</td>").format(text(cell).replace(" %", "\u00a0%")) for cell in rest)
        )
        for first, *rest in rows
    )
    table = Markup("<table><caption>{}</caption><thead><tr>{}</tr></thead><tbody>{}</tbody></table>").format(caption, top, lines)
    return Markup('<div class="hp-scroll" tabindex="0" role="region" aria-label="{}">{}</div>').format(caption, table)
