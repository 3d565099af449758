"""A diagnosis for people to read: the verdict in a sentence, Markdown, the terminal; `scan_page` makes a page of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_purify.redaction import short
from hf_purify.rendering import DASH, markdown_text

if TYPE_CHECKING:
    from rich.console import Group

    from hf_purify.diagnosis import Diagnosis, Signal, SuspectLayer

NAME, WORDS, NAMED = 48, 160, 6  # letters of a name, letters of a text, and names in a sentence
KINDS = {
    "none": "none",
    "single-target": "one class is the target",
    "multi-target": "several classes are targets",
}


@dataclass(frozen=True)
class Listing:
    """A small table.

    Args:
        numbers: the columns, by position, that hold numbers alone.
    """

    title: str
    heads: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    numbers: tuple[int, ...] = ()


def verdict(found: Diagnosis) -> str:
    """The outcome in a sentence or two."""
    scored = not math.isnan(found.score)
    of = f"an estimated {chance(found)} of clean models look as odd as this" if scored else "by a fixed rule, with no score"
    if not found.suspicious:
        return (
            f"No backdoor was found: {of}. A scan can miss one."
            if scored
            else "No class stands out, by a fixed rule, with no score: this says little."
        )
    names = _named(f"'{short(found.name_of(t), NAME)}'" for t in found.targets)
    where = f"towards the class{'es' if len(found.targets) > 1 else ''} {names}" if names else "whose target is not clear"
    return f"Suspicious of a backdoor {where}: {of}."


def outcome(found: Diagnosis) -> str:
    """The outcome in a word or three."""
    if math.isnan(found.score) and not found.suspicious:
        return "No score"
    return "Suspicious" if found.suspicious else "No backdoor found"


def chance(found: Diagnosis) -> str:
    """The share of clean models that look as odd."""
    return f"{100 * (1 - found.score):.1f} %" if found.score < 0.999 else "under 0.1 %"


def sentences(found: Diagnosis) -> list[str]:
    """What goes with the verdict: score, neurons, the ranking of samples, and what was not looked at."""
    said = []
    if not math.isnan(found.score):
        said.append(f"Score {found.score:.3f}; above {found.threshold:.3f} is suspicious.")
    if found.suspected:
        by = f", ranked by {short(found.ranked_by, WORDS)}" if found.ranked_by else ""
        said.append(f"{found.suspected:,} of {found.neurons:,} neurons ({share(found.suspected, found.neurons)}) are suspected{by}.")
    if found.suspects:
        said.append(_ranking(found))
    said += [f"Signal '{short(s.name, NAME)}': {short(s.unavailable, WORDS) or 'no values, no reason given'}." for s in missing(found)]
    return said


def listings(found: Diagnosis, most: int) -> list[Listing]:
    """What was found as tables of at most `most` rows each; those that would be empty are left out."""
    triggers = [
        (short(t.kind, NAME), short(t.label, NAME), str(t.asr), figure(t.size), short(t.words, WORDS) or DASH)
        for t in found.triggers[:most]
    ]
    worded = any(t.words for t in found.triggers)
    layers = [
        (
            short(layer.name, NAME, tail=20),
            f"{len(layer.neurons):,} of {layer.size:,}",
            share(len(layer.neurons), layer.size),
            top_score(layer),
        )
        for layer in most_suspected(found, most)
    ]
    tables = [
        Listing("Classes", ("Target" if found.targets else "Class", "Signals above their outlier line"), _classes(found, most)),
        Listing("Signals", ("Signal", "Highest class", "Value", "Outlier line", "Clean models as odd"), _signals(found), (2, 3, 4)),
        Listing(
            "Recovered triggers",
            ("Trigger", "Leads to", "ASR [95 %]", "Size", "Words")[: 4 + worded],
            [row[: 4 + worded] for row in triggers],
            (3,),
        ),
        Listing("Most suspicious layers", ("Layer", "Suspected", "Share", "Highest score"), layers, (1, 2, 3)),
        Listing("Most suspicious samples", ("Sample", "Data set says", "Model says", "Score"), _samples(found, most), (0, 3)),
    ]
    return [table for table in tables if table.rows]


def markdown(found: Diagnosis) -> str:
    """The findings in GitHub's Markdown."""
    parts = [f"**{markdown_text(verdict(found))}**", *map(markdown_text, sentences(found))]
    for table in listings(found, 20):
        rule = ("---:" if i in table.numbers else "---" for i in range(len(table.heads)))
        rows = [map(markdown_text, table.heads), rule, *(map(markdown_text, row) for row in table.rows)]
        parts.append(f"### {table.title}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows))
    if found.warnings:
        parts.append("### Warnings\n\n" + "\n".join(f"- {markdown_text(short(w, 1000))}" for w in found.warnings[:20]))
    return "\n\n".join(parts) + "\n"


def terminal(found: Diagnosis) -> Group:
    """The findings for a terminal; they fit 80 columns."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    color = "red" if found.suspicious else "yellow" if math.isnan(found.score) else "green"
    parts: list[Text | Table] = [Text(verdict(found), f"bold {color}"), *map(Text, sentences(found))]
    for listing in listings(found, 5):
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, title=listing.title, title_justify="left", title_style="bold")
        for i, head in enumerate(listing.heads):
            table.add_column(Text(head), justify="right" if i in listing.numbers else "left", overflow="fold")
        for row in listing.rows:
            table.add_row(*map(Text, row))
        parts += [Text(), table]
    return Group(*parts)


def missing(found: Diagnosis) -> list[Signal]:
    """The signals that have no values."""
    return [signal for signal in found.signals if not any(known(signal))]


def known(signal: Signal) -> list[bool]:
    """Which classes a signal has a value for; None and NaN are none."""
    return [v is not None and math.isfinite(v) for v in signal.values]


def above(signal: Signal, label: int) -> bool:
    """Whether a class lies above the signal's outlier line."""
    value = signal.values[label] if 0 <= label < len(signal.values) else None
    return value is not None and signal.line is not None and value > signal.line


def most_suspected(found: Diagnosis, most: int) -> list[SuspectLayer]:
    """Layers with suspected neurons, those with the largest share first."""
    layers = sorted((layer for layer in found.layers if layer.neurons), key=lambda layer: -len(layer.neurons) / max(1, layer.size))
    return layers[:most]


def figure(value: float | None) -> str:
    """A number of any size in three digits."""
    return DASH if value is None or not math.isfinite(value) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else DASH


def top_score(layer: SuspectLayer) -> str:
    return figure(layer.scores[-1]) if layer.scores else DASH


def _named(names: Iterable[str]) -> str:
    """`a`, `a and b`, `a, b and c`, and not all where they are many."""
    found = list(names)
    if len(found) > NAMED:
        found = [*found[: NAMED - 1], f"{len(found) - NAMED + 1} more"]
    return " and ".join([", ".join(found[:-1]), found[-1]] if len(found) > 1 else found)


def _ranking(found: Diagnosis) -> str:
    suspects = found.suspects
    if suspects is None:
        return ""
    said = f"{len(suspects.scores):,} samples of {short(suspects.source, WORDS)} were ranked"
    if suspects.poisoned is not None:
        said += f", of which {suspects.poisoned:,} are known to carry a trigger"
    return f"{said}; AUROC {auroc(suspects.auroc, suspects.interval)}."


def auroc(value: float | None, interval: Sequence[float | None]) -> str:
    """An AUROC with its interval, as far as they are known."""
    if value is None or not math.isfinite(value):
        return "unknown, as the truth is not"
    bounds = [f"{bound:.3f}" for bound in interval if bound is not None]
    return f"{value:.3f}{f' [{bounds[0]}, {bounds[1]}]' if len(bounds) == 2 else ''}"


def _classes(found: Diagnosis, most: int) -> list[tuple[str, ...]]:
    """The targets, or else the classes that lie above a line, with the signals that say so."""
    odd = {label: [s for s in found.signals if above(s, label)] for label in range(max((len(s.values) for s in found.signals), default=0))}
    labels = found.targets or sorted((label for label, signals in odd.items() if signals), key=lambda label: -len(odd[label]))
    told = ", ".join
    return [
        (
            short(found.name_of(label), NAME),
            told(f"{short(s.name, NAME)} {figure(s.values[label])} (line {figure(s.line)})" for s in odd.get(label, [])) or DASH,
        )
        for label in labels[:most]
    ]


def _signals(found: Diagnosis) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for signal in found.signals:
        if labels := [i for i, there in enumerate(known(signal)) if there]:
            highest = max(labels, key=signal.values.__getitem__)
            odd = DASH if signal.chance is None else f"{100 * signal.chance:.1f} %"
            rows.append(
                (short(signal.name, NAME), short(found.name_of(highest), NAME), figure(signal.values[highest]), figure(signal.line), odd)
            )
    return rows


def _samples(found: Diagnosis, most: int) -> list[tuple[str, ...]]:
    suspects = found.suspects
    if suspects is None:
        return []
    ranked = zip(suspects.order, suspects.top, strict=False)
    scores = dict(enumerate(suspects.scores))
    return [
        (f"{position:,}", short(shown.label, NAME), short(shown.said, NAME), figure(scores.get(position)))
        for position, shown in list(ranked)[:most]
    ]
