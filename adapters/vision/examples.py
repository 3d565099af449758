"""Images of a data set, decoded once and prepared for a model once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from hf_purify.adapter import Batch
from hf_purify.errors import DataError
from hf_purify.tables import draw, find_column, label_column, open_data, read_labels

Prepare = Callable[[list[Tensor]], Tensor]  # raw uint8 images (C, H, W) -> model input (n, ...)

_BUDGET = 4 * 2**30  # bytes of prepared images kept in memory; beyond it they are prepared batch by batch
_CHUNK = 256


@dataclass
class _Derived:
    """A triggered image: computed when it is asked for."""

    source: Tensor | _Derived
    transform: Callable[[Tensor, int], Tensor]
    seed: int

    def get(self) -> Tensor:
        return self.transform(_raw(self.source), self.seed)


def _raw(source: Tensor | _Derived) -> Tensor:
    return source if isinstance(source, Tensor) else source.get()


class ImageExamples:
    """Raw uint8 images `(C, H, W)` with labels `(n,)`, and what prepares them for the model."""

    lengths = None

    def __init__(self, sources: Sequence[Tensor | _Derived], labels: Tensor, prepare: Prepare, parent: ImageExamples | None = None) -> None:
        self.sources, self.labels, self.prepare, self._parent = list(sources), labels, prepare, parent
        self._rows: Tensor | None = None  # where this view's images lie in its parent; -1 where they are new
        self._block: Tensor | None = None

    def __len__(self) -> int:
        return len(self.sources)

    def raw(self, i: int) -> Tensor:
        """Image `i`, `(C, H, W)` uint8."""
        return _raw(self.sources[i])

    def batch(self, indices: Tensor) -> Batch:
        if self._block is None and self._fits():
            self._block = self._build()
        if self._block is not None:
            return {"pixel_values": self._block[indices], "labels": self.labels[indices]}
        return {"pixel_values": self.prepare([self.raw(int(i)) for i in indices]), "labels": self.labels[indices]}

    def select(self, indices: Tensor) -> ImageExamples:
        view = ImageExamples([self.sources[int(i)] for i in indices], self.labels[indices], self.prepare, self)
        view._rows = indices.clone()
        return view

    def overlay(self, indices: Tensor, transform: Callable[[Tensor, int], Tensor], labels: Tensor, seed: int) -> ImageExamples:
        sources, targets = list(self.sources), self.labels.clone()
        rows = torch.arange(len(self))
        for i in indices.tolist():
            sources[i] = _Derived(sources[i], transform, seed + i)
        targets[indices] = labels
        rows[indices] = -1
        view = ImageExamples(sources, targets, self.prepare, self)
        view._rows = rows
        return view

    def _fits(self) -> bool:
        if not len(self):
            return False
        one = self.prepare([self.raw(0)])
        return one.numel() * one.element_size() * len(self) <= _BUDGET

    def _build(self) -> Tensor:
        """All prepared images as one tensor; those that a parent has prepared already are copied from it."""
        known = self._rows if self._rows is not None and self._parent is not None and self._parent._block is not None else None
        new = (known < 0).nonzero().flatten() if known is not None else torch.arange(len(self))
        parts = [
            self.prepare([self.raw(int(i)) for i in chunk])
            for chunk in tqdm(new.split(_CHUNK), desc="prepare images", delay=2.0, leave=False, disable=None)
            if len(chunk)
        ]
        fresh = torch.cat(parts) if parts else torch.empty(0)
        if known is None:
            return fresh
        block = self._parent._block[known.clamp_min(0)]  # type: ignore[union-attr, index]
        if len(new):
            block[new] = fresh
        return block


def _is_image(_: str, feature: Any) -> bool:
    return isinstance(feature, datasets.Image)


def decode(image: Any, channels: int, to_rgb: bool) -> Tensor:
    """A PIL image as uint8 `(C, H, W)`.

    Raises:
        DataError: a grey image for a colour model, unless `to_rgb`; something that is no image.
    """
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise DataError(f"expected an image, got {type(image).__name__}")
    grey = image.mode in ("1", "L", "LA", "I", "I;16", "F")
    if channels == 3 and grey and not to_rgb:
        raise DataError(
            f"the model expects colour images (3 channels); the data holds grey ones (mode {image.mode}). Pass to_rgb (--to-rgb) to repeat the grey channel"
        )
    array = np.asarray(image.convert("RGB" if channels == 3 else "L"))
    return torch.from_numpy(array.copy()).reshape(array.shape[0], array.shape[1], -1).permute(2, 0, 1).contiguous()


def read_images(
    data: Any,
    prepare: Prepare,
    classes: int,
    model_labels: list[str],
    channels: int = 3,
    samples: int | None = None,
    seed: int = 0,
    split: str | None = None,
    revision: str | None = None,
    columns: Mapping[str, str] | None = None,
    to_rgb: bool = False,
    balanced: bool = True,
) -> ImageExamples:
    """Read images and labels; only those that are drawn are decoded."""
    opened, columns = open_data(data, split, revision, loose="imagefolder"), columns or {}
    images = find_column(opened, columns.get("image"), "image", _is_image)
    labels = read_labels(opened, label_column(opened, columns.get("label")), model_labels, classes)
    if not len(labels):
        raise DataError("the clean set is empty: give at least one image per class")
    chosen = draw(labels, samples, seed) if balanced else torch.arange(len(labels))
    column = opened.select_columns([images])
    if not isinstance(opened.features[images], datasets.Image):
        column = column.cast_column(images, datasets.Image())
    bar = tqdm(chosen.tolist(), desc="decode images", delay=2.0, leave=False, disable=None)
    try:
        raws = [decode(column[i][images], channels, to_rgb) for i in bar]
    except (OSError, ValueError) as error:
        raise DataError(f"an image of column '{images}' cannot be decoded: {error}") from error
    return ImageExamples(raws, labels[chosen], prepare)
