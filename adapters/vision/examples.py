"""Images of a data set, decoded once and prepared for a model once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from hf_purify.errors import DataError
from hf_purify.tables import draw, find_column, label_column, open_data, read_labels

from .._prepared import Prepare, PreparedExamples


class ImageExamples(PreparedExamples):
    """Raw uint8 images `(C, H, W)` with labels `(n,)`, and what prepares them for the model."""

    key = "pixel_values"


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
