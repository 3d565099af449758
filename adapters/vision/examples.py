"""Images of a data set, decoded once and prepared for a model once."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hf_purify.adapter import Loaded
from hf_purify.errors import DataError
from hf_purify.tables import Selection, find_column, open_data, read_each, stored_cells

from .._images import open_image
from .._prepared import PreparedExamples
from .loading import preparer


class ImageExamples(PreparedExamples):
    """Raw uint8 images `(C, H, W)` with labels `(n,)`, and what prepares them for the model."""

    key = "pixel_values"


def is_image(_: str, feature: Any) -> bool:
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


def read_images(data: Any, loaded: Loaded, classes: int, wanted: Selection, channels: int = 3, to_rgb: bool = False) -> ImageExamples:
    """Read images and labels; only those that are drawn are decoded."""
    opened = open_data(data, wanted.split, wanted.revision, loose="imagefolder")
    images = find_column(opened, wanted.columns.get("image"), "image", is_image)
    chosen, labels = wanted.labelled(opened, classes, loaded.labels, "image")
    raws = decode_column(opened, images, chosen, channels, to_rgb)
    return ImageExamples(raws, labels, preparer(loaded.processor))


def decode_column(data: datasets.Dataset, name: str, rows: Tensor, channels: int, to_rgb: bool) -> list[Tensor]:
    """Some images of a column, as uint8 `(C, H, W)`.

    Raises:
        DataError: one cannot be decoded.
    """
    feature = data.features[name]
    if not isinstance(feature, datasets.Image):
        feature = datasets.Image()
        data = data.select_columns([name]).cast_column(name, feature)
    cells = stored_cells(data, name)

    def read(i: int) -> Tensor:
        return decode(open_image(cells(i), f"row {i} of column '{name}'", feature.mode), channels, to_rgb)

    return read_each(rows, "decode images", read)
