"""A report for people to read: the verdict in a sentence, the table in Markdown and for a terminal, the page."""

from __future__ import annotations

import base64
import html
import importlib.resources
import math
import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from hf_purify.redaction import one_line

if TYPE_CHECKING:
    from jinja2 import Template
    from rich.table import Table

    from hf_purify.metrics import Proportion
    from hf_purify.report import Report
    from hf_purify.rows import Row

TEXT_COLUMNS = ("Model", "Trigger")
DASH = "\u2013"
NO_BREAK = "\u00a0"


class Cell(NamedTuple):
    """A figure and, beside or below it in smaller type, its interval."""

    text: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.text} {self.detail}".rstrip()


def verdict(report: Report) -> str:
    """The outcome in one sentence. A rate is said to be lowered only where the two 95 % intervals do not meet."""
    before, after = report.before, report.after
    if before is None:
        return "The unrepaired model was not measured, so nothing is compared."
    if after is None:
        return _state(before)
    name = _display(after.name)
    pairs = [(t, before.asr.get(t), after.asr.get(t)) for t in report.triggers]
    attacks = [_attack_change(t, old, new) for t, old, new in pairs if old and new and old.n and new.n]
    accuracy = _use_change(before, after)
    if attacks:
        others = ["; it " + attack.replace("the attack success rate", "that", 1) for attack in attacks[1:]]
        return f"{name} {attacks[0]}{''.join(others)}{'; it' if others else ' and'} {accuracy}."
    return f"{name} {accuracy}. No trigger was measured, so nothing is said here about a backdoor."


def grid(report: Report) -> tuple[list[str], list[tuple[Row, list[list[Cell]]]]]:
    """Headings and, for each row, its lines of cells: one line, or one a trigger where there are several."""
    triggers, rows = report.triggers, report.ordered
    many = len(triggers) > 1
    n_clean = _common(row.clean_accuracy for row in rows)
    useful = list(dict.fromkeys(name for row in rows for name in row.utility))
    judged = any(row.clean_accuracy is not None for row in rows) or not useful
    robust = judged or any(row.robust_accuracy for row in rows)
    n_asr, n_robust = (_common(p for row in rows for p in getattr(row, key).values()) for key in ("asr", "robust_accuracy"))
    heads = ["Model", *[f"Clean accuracy{_n(n_clean)}"] * judged, *map(one_line, useful)]
    if triggers:
        of = "" if many else f" {one_line(triggers[0])}"
        heads += ["Trigger"] * many + [f"ASR{of}{_n(n_asr)}"] + [f"Robust accuracy{_n(n_robust)}", "DER"] * robust
    heads.append("Seconds")
    lines = []
    for row in rows:
        kind = "" if row.label == row.name else f"({row.kind})"
        first, last = [Cell(one_line(row.name), kind), *[_share(row.clean_accuracy, n_clean)] * judged], Cell(_number(row.seconds, ".1f"))
        first += [Cell(_number(row.utility.get(name), ".2f")) for name in useful]
        attacks = [
            [Cell(one_line(t))] * many
            + [_share(row.asr.get(t), n_asr)]
            + [_share(row.robust_accuracy.get(t), n_robust), Cell(_percent(row.der.get(t)))] * robust
            for t in triggers
        ]
        lines.append((row, [[*first, *attack, last] for attack in attacks or [[]]]))
    return heads, lines


def own_columns(heads: list[str]) -> int:
    """Columns before the triggers': a row has those, and the last one, once for all its lines."""
    return heads.index("Trigger") if "Trigger" in heads else len(heads)


def markdown(report: Report) -> str:
    """The table in GitHub's Markdown, every interval beside its figure."""
    heads, rows = grid(report)
    rule = ["---" if head in TEXT_COLUMNS else "---:" for head in heads]
    lines = [[str(cell) for cell in line] for _, lines in rows for line in lines]
    table = [[markdown_text(cell) for cell in cells] for cells in (heads, *lines)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (table[0], rule, *table[1:]))


def terminal_table(report: Report) -> Table:
    """The table for a terminal; it fits 80 columns with one trigger."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    heads, rows = grid(report)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for head in heads:
        text = head in TEXT_COLUMNS
        words = Text(head.replace(" ", "\n"))
        table.add_column(words, justify="left" if text else "right", no_wrap=not text, min_width=12 if text else None, overflow="fold")
    own = own_columns(heads)
    for row, lines in rows:
        style = "bold" if row is report.after else ""
        for i, line in enumerate(lines):
            shown = [c if i == 0 or own <= j < len(line) - 1 else Cell("") for j, c in enumerate(line)]
            details = ["\n" + c.detail.replace(" (", "\n(") if c.detail else "" for c in shown]
            table.add_row(*(Text.assemble((c.text, style), (detail, "dim")) for c, detail in zip(shown, details, strict=True)))
    return table


def page(report: Report, pictures: Mapping[str, list[str]] | None = None) -> str:
    """A page that needs nothing else: no network, no script; light, dark and on paper.

    Args:
        pictures: what `pictures_of` has drawn, where that was done before.
    """
    heads, rows = grid(report)
    return template("report.html.j2").render(
        report=report,
        facts=report.to_dict(),
        heads=heads,
        own=own_columns(heads),
        rows=rows,
        pictures=pictures_of(report) if pictures is None else pictures,
        zip=zip,
    )


def template(name: str) -> Template:
    """A page of `hub_cards`; every value that it shows is escaped, and passes through `one_line`."""
    import jinja2
    from markupsafe import Markup

    def shown(value: Any) -> Any:
        if not isinstance(value, str) or isinstance(value, Markup):
            return value
        return NO_BREAK.join(map(one_line, value.split(NO_BREAK)))  # templates put these; for one_line they are no printable characters

    loader = jinja2.FunctionLoader(lambda part: importlib.resources.files("hf_purify_hub_cards").joinpath(part).read_text("utf-8"))
    options: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    return jinja2.Environment(autoescape=True, finalize=shown, loader=loader, **options).get_template(name)


def markdown_text(text: str) -> str:
    r"""One line with what Markdown or HTML would read escaped, addresses too: `a|b` becomes `a\|b`; `[93.5, 94.8]` is no link and stays so."""
    text = html.escape(one_line(text), quote=False)
    return re.sub(r"([\\`*|~]|\](?=[(\[:])|:(?=//)|(?<=www)\.|@)", r"\\\1", text, flags=re.IGNORECASE)


def _number(value: float | None, spec: str) -> str:
    return DASH if value is None or not math.isfinite(value) else format(value, spec)


def _percent(value: float | None) -> str:
    return DASH if value is None or not math.isfinite(value) else f"{100 * value:.1f} %"


def _common(proportions: Iterable[Proportion | None]) -> int | None:
    """The number of samples, where it is one and the same everywhere."""
    counts = {p.n for p in proportions if p is not None}
    return counts.pop() if len(counts) == 1 else None


def _n(n: int | None) -> str:
    return "" if n is None else f" (n={n})"


def _share(p: Proportion | None, n: int | None) -> Cell:
    """A proportion with its interval, and with its n unless the heading has it."""
    if p is None or not p.n:
        return Cell(DASH)
    low, high = p.interval
    return Cell(_percent(p.value), f"[{100 * low:.1f}, {100 * high:.1f}]{'' if n else _n(p.n)}")


def _display(name: str) -> str:
    """Short method names are acronyms: `nft+fine_tune` reads `NFT+fine_tune`."""
    return "+".join(part.upper() if len(part) <= 4 else part for part in one_line(name).split("+"))


def _state(row: Row) -> str:
    attacks = [f"{one_line(t)} succeeds on {_percent(p.value)} of triggered samples{_n(p.n)}" for t, p in row.asr.items() if p.n]
    accuracy = row.clean_accuracy
    figures = ", ".join(f"a {one_line(name)} of {value:.2f}" for name, value in row.utility.items())
    known = [f"has {figures} on clean samples"] if figures else []
    known += [f"classifies {_percent(accuracy.value)} of clean samples correctly{_n(accuracy.n)}"] if accuracy and accuracy.n else []
    if attacks and not known:
        return f"On the unrepaired model {'; '.join(attacks)}."
    return f"The unrepaired model {'; '.join(known + attacks) or 'was not measured'}."


def _attack_change(trigger: str, before: Proportion, after: Proportion) -> str:
    old, new, of = _percent(before.value), _percent(after.value), f"the attack success rate of {one_line(trigger)}"
    if after.interval[1] < before.interval[0]:
        return f"lowered {of} from {old} to {new}{_n(after.n)}"
    if after.interval[0] > before.interval[1]:
        return f"raised {of} from {old} to {new}{_n(after.n)}"
    return f"did not measurably change {of} ({old} before, {new} after, n={after.n})"


def _use_change(before: Row, after: Row) -> str:
    """What happened to the first figure of use: clean accuracy, or one like BLEU."""
    if before.clean_accuracy is None and (name := next((n for n in before.utility if n in after.utility), None)) is not None:
        old, new = f"{before.utility[name]:.2f}", f"{after.utility[name]:.2f}"
        return f"left {one_line(name)} at {old}" if old == new else f"took {one_line(name)} from {old} to {new}"
    return _accuracy_change(before.clean_accuracy, after.clean_accuracy)


def _accuracy_change(before: Proportion | None, after: Proportion | None) -> str:
    if not (before and after and before.n and after.n):
        return "was not measured on clean samples"
    points = 100 * (after.value - before.value)
    if abs(points) < 0.05:
        return "left clean accuracy as it was"
    return f"{'gained' if points > 0 else 'cost'} {abs(points):.1f} points of clean accuracy"


def pictures_of(report: Report) -> dict[str, list[str]]:
    """What there is to show: name -> base64 PNG, light and dark. A mask of ones, scores of zero and no change are nothing."""
    from hf_purify import pictures

    rows = [row for row in report.ordered if row.clean_accuracy or row.asr]
    samples = [s for s in report.samples if s.clean is not None and s.triggered is not None]
    scored = [layer for layer in report.layers if layer.scores]
    masked = any(m != 1 for layer in report.layers for m in layer.mask)
    moved = [layer for layer in report.layers if layer.change is not None]
    draw = {
        "bars": partial(pictures.bars_figure, rows) if rows else None,
        "samples": partial(pictures.samples_figure, samples) if samples else None,
        "curve": partial(pictures.curve_figure, report.curve, report.curve_chosen) if report.curve else None,
        "mask": partial(pictures.mask_figure, report.layers) if masked else None,
        "change": partial(pictures.change_figure, moved) if any(layer.change for layer in moved) else None,
        "scores": partial(pictures.salience_figure, scored) if any(q for layer in scored for q in layer.scores) else None,
    }
    return {name: [base64.b64encode(figure(dark=dark)).decode() for dark in (False, True)] for name, figure in draw.items() if figure}
