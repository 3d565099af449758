"""Images of a data set, decoded once and prepared for a model once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from hf_purify.adapter import Batch
from hf_purify.errors import DataError, did_you_mean

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


def open_data(data: Any, split: str | None = None, revision: str | None = None) -> datasets.Dataset:
    """Open a `datasets.Dataset`, a folder of images, Parquet files, or a data set of the Hub.

    Raises:
        DataError: it cannot be found or read, or has several splits and none is named.
    """
    if isinstance(data, datasets.Dataset):
        return data
    if isinstance(data, datasets.DatasetDict):
        return _one_split(data, split, "the data set")
    name = str(data)
    path = Path(name).expanduser()
    try:
        if path.suffix == ".parquet" or "*" in name:
            return datasets.load_dataset("parquet", data_files={"train": name}, split="train")
        if path.is_dir():
            files = sorted(str(p) for p in path.glob("*.parquet"))
            if files:
                stems = {Path(f).stem.split("-")[0]: [] for f in files}
                for f in files:
                    stems[Path(f).stem.split("-")[0]].append(f)
                return _one_split(datasets.load_dataset("parquet", data_files=stems), split, name)
            return _one_split(datasets.load_dataset("imagefolder", data_dir=str(path)), split, name)
        if path.exists():
            raise DataError(f"expected a folder of images, a Parquet file or a data set id; got the file '{name}'")
        return _one_split(datasets.load_dataset(name, revision=revision), split, name)
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"cannot read the data set '{name}': {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error


def _one_split(data: datasets.DatasetDict, split: str | None, name: str) -> datasets.Dataset:
    if split is None and len(data) == 1:
        return next(iter(data.values()))
    if split is None and "train" in data:
        return data["train"]
    if split not in data:
        raise DataError(f"{name} has no split '{split}'{did_you_mean(str(split), data)} (splits: {', '.join(data)})")
    return data[split]


def find_column(data: datasets.Dataset, named: str | None, kind: str, fits: Callable[[str, Any], bool]) -> str:
    """Find a column by its feature, or check the one that was named.

    Raises:
        DataError: none or several fit; the message lists the columns.
    """
    columns = ", ".join(f"{n} ({type(f).__name__})" for n, f in data.features.items())
    if named is not None:
        if named not in data.features:
            raise DataError(f"no column '{named}'{did_you_mean(named, data.features)}; the data set has: {columns}")
        return named
    found = [n for n, f in data.features.items() if fits(n, f)]
    if len(found) != 1:
        what = f"no {kind} column found" if not found else f"several {kind} columns found ({', '.join(found)})"
        raise DataError(f"{what}; name it with {kind}_column. The data set has: {columns}")
    return found[0]


def _is_image(_: str, feature: Any) -> bool:
    return isinstance(feature, datasets.Image)


def label_column(data: datasets.Dataset, named: str | None) -> str:
    """The label column: the only ClassLabel, else an integer or string column called label, labels, class or target."""
    classes = [n for n, f in data.features.items() if isinstance(f, datasets.ClassLabel)]
    if named is None and len(classes) == 1:
        return classes[0]
    names = ("label", "labels", "class", "target")
    return find_column(
        data, named, "label", lambda n, f: isinstance(f, datasets.ClassLabel) or (n.lower() in names and isinstance(f, datasets.Value))
    )


def read_labels(data: datasets.Dataset, column: str, model_labels: list[str], classes: int) -> Tensor:
    """Labels `(n,)` as class numbers of the model; names are matched where both sides have them.

    Raises:
        DataError: a label outside the model's classes, or class names that do not match.
    """
    feature, values = data.features[column], data[column][:]
    named = bool(model_labels) and not all(n.upper() == f"LABEL_{i}" for i, n in enumerate(model_labels))
    known = {n.strip().lower(): i for i, n in enumerate(model_labels)}
    if isinstance(feature, datasets.ClassLabel) and named:
        missing = [n for n in feature.names if n.strip().lower() not in known]
        if missing:
            raise DataError(
                f"class names do not match: the data has {len(feature.names)} classes, and {len(missing)} of them, such as '{missing[0]}', are none of the "
                f"model's {len(model_labels)} ('{model_labels[0]}', ...); use data with the model's classes, or rename them"
            )
        return torch.tensor([known[feature.names[v].strip().lower()] for v in values])
    if values and isinstance(values[0], str):
        missing = sorted({v for v in values if v.strip().lower() not in known})
        if missing:
            raise DataError(
                f"label '{missing[0]}' is none of the model's classes: {', '.join(model_labels[:10]) or 'the model names none'}"
            )
        return torch.tensor([known[v.strip().lower()] for v in values])
    if any(v is None for v in values):
        raise DataError(f"column '{column}' has missing labels")
    labels = torch.tensor(values, dtype=torch.long)
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        bad = labels[(labels < 0) | (labels >= classes)][0]
        raise DataError(f"label {int(bad)} is outside the model's range 0..{classes - 1}; the model has {classes} classes")
    return labels


def draw(labels: Tensor, samples: int | None, seed: int) -> Tensor:
    """A seeded, class-balanced selection `(samples,)`: classes take turns until enough are drawn.

    Raises:
        DataError: fewer samples asked for, or there, than classes.
    """
    present = labels.unique().tolist()
    if not present:
        raise DataError("the clean set is empty: give at least one image per class")
    if len(present) < 2:
        raise DataError(f"the clean set holds a single class ({present[0]}); a repair needs samples of all classes")
    if samples is None or samples >= len(labels):
        return torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    if samples < len(present):
        raise DataError(f"{samples} samples are fewer than the {len(present)} classes; ask for at least one image per class")
    generator = torch.Generator().manual_seed(seed)
    queues = {c: (labels == c).nonzero().flatten() for c in present}
    queues = {c: q[torch.randperm(len(q), generator=generator)] for c, q in queues.items()}
    chosen: list[Tensor] = []
    while sum(len(c) for c in chosen) < samples:
        order = torch.randperm(len(present), generator=generator).tolist()
        taken = [queues[present[k]][:1] for k in order if len(queues[present[k]])]
        queues = {c: q[1:] for c, q in queues.items()}
        chosen += taken[: samples - sum(len(c) for c in chosen)]
    return torch.cat(chosen)


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
    image_column: str | None = None,
    label_column_name: str | None = None,
    to_rgb: bool = False,
    balanced: bool = True,
) -> ImageExamples:
    """Read images and labels; only those that are drawn are decoded."""
    opened = open_data(data, split, revision)
    images = find_column(opened, image_column, "image", _is_image)
    labels = read_labels(opened, label_column(opened, label_column_name), model_labels, classes)
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
