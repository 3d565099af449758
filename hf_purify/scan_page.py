"""The page of a scan: what a diagnosis holds, cut to what a page can show."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate, groupby, islice, takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

from hf_purify import findings
from hf_purify.plain import plain
from hf_purify.redaction import short
from hf_purify.rendering import template
from hf_purify.scan_pictures import Gallery, bars_of, strip

if TYPE_CHECKING:
    from hf_purify.diagnosis import Diagnosis, SuspectLayer

TRIGGERS, SAMPLES, SUSPECTS, LAYERS, WARNINGS = 10, 6, 12, 40, 20  # that a page shows
NEURONS = 100  # of a layer, that are listed
DEPTH, ENTRIES, LETTERS, FACTS = 5, 60, 1000, 60_000  # of facts: nesting, entries of one, letters of one, letters in all
PIECES, BEFORE, TEXT = 240, 40, 900  # of a sample's text: words and spaces, of them before its first change, letters
# Spaces; a letter of a script without them; a word of another.
PIECE = re.compile("\\s+|[\u2e80-\u9fff\uac00-\ud7ff]|[^\\s\u2e80-\u9fff\uac00-\ud7ff]+")


class Piece(NamedTuple):
    """A stretch of a text; `new` where the text that it is compared with does not have it."""

    text: str
    new: bool


def page(found: Diagnosis) -> str:
    """The page; it holds a few hundred of each thing at most, and stays under 2 MB whatever the diagnosis holds."""
    triggers = found.triggers[:TRIGGERS]
    suspects = list(zip(found.suspects.order, found.suspects.top, strict=False))[:SUSPECTS] if found.suspects else []
    shown = [s for trigger in triggers for s in trigger.samples[:SAMPLES]] + [s for _, s in suspects]
    pictures = [trigger.picture for trigger in triggers] + [p for s in shown for p in (s.clean, s.triggered)]
    layers = found.layers
    if len(layers) > LAYERS:
        most = {id(layer) for layer in findings.most_suspected(found, LAYERS)}
        layers = [layer for layer in layers if id(layer) in most]
    return template("scan.html.j2").render(
        found=found,
        findings=findings,
        short=short,
        triggers=triggers,
        samples=SAMPLES,
        suspects=suspects,
        scores=dict(enumerate(found.suspects.scores)) if found.suspects else {},
        layers=layers,
        lists=[(layer, *numbers(layer)) for layer in layers if layer.neurons],
        warnings=found.warnings[:WARNINGS],
        bars=[(signal, bars_of(found, signal)) for signal in found.signals if any(findings.known(signal))],
        strip=strip,
        thumb=Gallery(pictures),
        marked=marked,
        facts=_facts(found),
    )


def numbers(layer: SuspectLayer) -> tuple[str, int]:
    """A layer's suspected neurons in order, as many as a page shows, and how many more there are."""
    chosen = sorted(layer.neurons[:NEURONS])
    return ", ".join(map(str, chosen)), len(layer.neurons) - len(chosen)


def marked(clean: str, triggered: str) -> list[Piece]:
    """A text in pieces, with what the clean one does not have marked; of a long text, what surrounds the first change.

    >>> marked("this film", "this cf film")
    [Piece(text='this ', new=False), Piece(text='cf', new=True), Piece(text=' film', new=False)]
    """
    old, new = (PIECE.findall(text[:100_000]) for text in (clean, triggered))
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(old, new, strict=False)))
    start = max(0, same - BEFORE)
    old, new = old[start : start + PIECES], new[start : start + 2 * PIECES]
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    kept = {b + i for _, b, size in matcher.get_matching_blocks() for i in range(size)}
    fresh = [i not in kept for i in range(len(new))] + [False]
    changed = [fresh[i] and (fresh[i + 1] or not word.isspace()) for i, word in enumerate(new)]  # no mark ends in a space
    cut = list(zip((short(word, 80) if len(word) > 80 else word for word in new[:PIECES]), changed, strict=False))
    cut = [word for word, end in zip(cut, accumulate(len(word) for word, _ in cut), strict=True) if end <= TEXT]
    pieces = [Piece("".join(word for word, _ in group), new_one) for new_one, group in groupby(cut, key=lambda pair: pair[1])]
    return [*([Piece("… ", False)] if start else []), *pieces, *([Piece(" …", False)] if len(new) > len(cut) else [])]


def _facts(found: Diagnosis) -> dict[str, Any]:
    """Headings, and what goes under each."""
    room = _Room()
    facts = {
        "Model": found.checkpoint,
        "Clean data": found.clean,
        "Calibration": found.calibration,
        "Settings": found.config,
        "Seconds": found.seconds,
        "Versions": found.versions,
        "Agreement of the neuron signals (Spearman)": found.agreement,
    }
    return {heading: room.cut(items) for heading, items in facts.items()}


class _Room:
    """Facts are a stranger's too: what is long, deep or many is cut to what the page has room for."""

    def __init__(self) -> None:
        self.left = FACTS

    def cut(self, value: Any, depth: int = 0) -> Any:
        if isinstance(value, Mapping | list | tuple) and depth == DEPTH:
            return "…"
        if isinstance(value, Mapping):
            return {self.cut(str(k)): self.cut(v, depth + 1) for k, v in self._some(value.items())}
        if isinstance(value, list | tuple):
            more = len(value) - ENTRIES
            return [self.cut(v, depth + 1) for v in self._some(value)] + ([f"{more} more"] if more > 0 else [])
        if not isinstance(value, str):
            return self.cut(plain(value), depth) if isinstance(plain(value), str | list) else plain(value)
        text = short(value, LETTERS)
        self.left -= len(text)
        return text

    def _some(self, values: Iterable[Any]) -> Iterator[Any]:
        return takewhile(lambda _: self.left > 0, islice(values, ENTRIES))
