"""What the page of a scan draws: bars of the classes, neurons along their layers, thumbnails of samples.

Bars and strips are shapes of SVG without any text; names and figures stand beside them as text, which a screen reader
reads, a search finds, and any width can hold. Both take their colours from the page.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from hf_purify.findings import above, known

if TYPE_CHECKING:
    from PIL.Image import Image

    from hf_purify.diagnosis import Diagnosis, Signal

BARS = 20  # classes that have a bar each
CELLS = 400  # of a strip: in a larger layer, neighbours share one
SIDES = (256, 192, 128, 96, 64, 48)
BUDGET = 1_000_000  # bytes of all thumbnails of a page


@dataclass(frozen=True)
class Bar:
    """One class: its value, None where there is none, and where its bar begins and how long it is, in % of the width."""

    label: int
    value: float | None
    start: float = 0.0
    length: float = 0.0
    above: bool = False
    target: bool = False


@dataclass(frozen=True)
class Bars:
    """A signal's bars, on one scale.

    Args:
        bars: the classes in order; where there are more than 20, those with the highest values, highest first, and the targets.
        line: where the outlier line is, in % of the width.
        classes: how many the signal has.
        marks: all values as marks on one line, an SVG path 100 wide and 10 high; empty where each class has its bar.
    """

    bars: list[Bar]
    line: float | None
    classes: int
    marks: str = ""


@dataclass(frozen=True)
class Thumb:
    """A picture as PNG in base64, with its size in pixels."""

    data: str
    width: int
    height: int


def bars_of(found: Diagnosis, signal: Signal) -> Bars:
    """The bars of a signal that has values."""
    there = known(signal)
    values = [float(v) if ok else 0.0 for v, ok in zip(signal.values, there, strict=True)]
    ends = [0.0, *values, *([] if signal.line is None else [signal.line])]
    low, high = min(ends), max(ends)
    scale = 97 / ((high - low) or 1.0)  # the last 3 % keep a line at the end in sight

    def place(value: float) -> float:
        return round((value - low) * scale, 2)

    def bar(label: int) -> Bar:
        first, last = sorted((place(0.0), place(values[label])))
        odd = above(signal, label)
        return Bar(label, values[label] if there[label] else None, first, round(last - first, 2), odd, label in found.targets)

    labels: Iterable[int] = range(len(values))
    many = len(values) > BARS
    if many:
        highest = sorted(labels, key=lambda label: (not there[label], -values[label]))[:BARS]
        labels = [*highest, *(t for t in found.targets[:BARS] if t not in highest and 0 <= t < len(values))]
    marks = "".join(f"M{x / 10:g} 1v8" for x in sorted({round(place(v) * 10) for v, ok in zip(values, there, strict=True) if ok}))
    return Bars([bar(label) for label in labels], None if signal.line is None else place(signal.line), len(values), marks if many else "")


def strip(neurons: Iterable[int], size: int) -> str:
    """Neurons of a layer as marks along it: an SVG path 100 wide and 10 high."""
    cells = min(max(size, 1), CELLS)
    marked = sorted({neuron * cells // size for neuron in neurons if 0 <= neuron < size})
    runs = [[cell for _, cell in run] for _, run in groupby(enumerate(marked), key=lambda pair: pair[1] - pair[0])]
    return "".join(f"M{run[0] * 100 / cells:g} 0h{len(run) * 100 / cells:g}v10h-{len(run) * 100 / cells:g}z" for run in runs)


class Gallery:
    """Thumbnails of pictures `(H, W, 3)` or `(H, W)` of uint8, made as small as it takes for all to fit the page."""

    def __init__(self, pictures: Sequence[np.ndarray | None]) -> None:
        shown = [picture for picture in pictures if picture is not None]
        self._kept = shown  # or another picture could get the id of one that is gone
        self._thumbs: dict[int, Thumb] = {}
        for side in SIDES:
            if (thumbs := _thumbs(shown, side)) is not None:
                self._thumbs = thumbs
                break

    def __call__(self, picture: np.ndarray | None) -> Thumb | None:
        return self._thumbs.get(id(picture))


def _thumbs(pictures: Sequence[np.ndarray], side: int) -> dict[int, Thumb] | None:
    """Thumbnails of at most `side` pixels; None where they do not fit, but at the smallest size, at which any few hundred do."""
    thumbs: dict[int, Thumb] = {}
    left = BUDGET
    for picture in pictures:
        thumb = thumbs[id(picture)] = thumbs.get(id(picture)) or _thumb(picture, side)
        left -= len(thumb.data)  # also of one that is shown again
        if left < 0 and side != SIDES[-1]:
            return None
    return thumbs


def _thumb(picture: np.ndarray, side: int) -> Thumb:
    from PIL import Image

    pixels = np.asarray(picture, dtype=np.uint8)
    image = Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels).convert("RGB")
    if max(image.size) > side:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    data = _png(image)
    if len(data) > 12_000:
        data = _png(image.quantize(256))
    return Thumb(base64.b64encode(data).decode(), *image.size)


def _png(image: Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
