"""Pictures of a data set, opened with care: what their header says is looked at before a pixel is decoded. Shared by the modalities."""

from __future__ import annotations

import functools
import io
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from hf_purify.errors import DataError

from ._sources import source_of

PIXELS = 2**26  # of a picture
BYTES = 2**28  # of its file
# Of those that Pillow reads, the ones that data sets are made of: others run programs (EPS) or are read by what few have looked at.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA")


def open_image(cell: Any, what: str, mode: str | None = None) -> Any:
    """A picture, decoded as `datasets.Image` does it; of several frames, the first.

    Args:
        cell: what a data set stores, or a picture or an array, which is given back.
        what: for messages, such as `row 3 of column 'image'`.
        mode: that the feature of the column asks for.

    Raises:
        DataError: no picture, a broken one, or one of more than 2^26 pixels.
    """
    if isinstance(cell, (Image.Image, np.ndarray)):
        return cell
    source = source_of(cell, what, BYTES)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_formats()) as image:
            _check_size(image.size, what)
            image.load()
            if image.getexif().get(ExifTags.Base.Orientation) is not None:
                image = ImageOps.exif_transpose(image)
            return image.convert(mode) if mode and mode != image.mode else image
    except DataError:
        raise
    except Image.UnidentifiedImageError:
        raise DataError(f"{what} is no picture that can be read ({', '.join(_formats())})") from None
    except Exception as error:  # each of Pillow's decoders fails in its own way
        raise DataError(f"{what} cannot be decoded as a picture: {str(error) or type(error).__name__}") from error


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _check_size(size: tuple[int, int], what: str) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise DataError(f"{what} is a picture of {width}x{height} pixels; it needs at least one")
    if width * height > PIXELS:
        raise DataError(
            f"{what} is a picture of {width}x{height} pixels, which may be there to fill the memory; {PIXELS:,} in all are the most"
        )
