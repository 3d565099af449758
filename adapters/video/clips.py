"""Clips from files, and which of their frames a model sees."""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_purify.errors import DataError, MissingExtra

from .._sources import source_of

MOST = 4096  # frames of a file that are looked at
SIDE = 256  # pixels of the shorter side; larger frames are scaled down as they are read
PIXELS = 2**26  # of a frame
ALL_PIXELS = 2**34  # of the frames that are looked at: 4,096 in full HD, 2,000 in 4K
LONGEST = 64  # times that a frame is as long as it is short
LARGEST = 2**32  # bytes of a file
# Containers that are read; others, such as playlists, name further files, or are sound or pictures.
FORMATS = "mov,matroska,webm,avi,mpeg,mpegts,mpegvideo,m4v,h264,hevc,flv,ogg,asf,gif,apng"


def spread(total: int, wanted: int, step: float | None = None) -> list[int]:
    """Which of `total` frames a model sees: `wanted`, evenly over all, or `step` apart from the middle on both sides where that many fit.

    >>> spread(8, 4), spread(2, 4), spread(100, 4, step=2.0)
    ([1, 3, 5, 7], [0, 0, 1, 1], [47, 49, 51, 53])
    """
    whole = step is None or step * wanted > total
    start, by = (0.0, total / wanted) if whole else ((total - step * wanted) / 2, step)  # type: ignore[operator]
    return [min(total - 1, int(start + by * (i + 0.5))) for i in range(wanted)]


class Decoded(NamedTuple):
    """The frames that a model sees `(T, 3, H, W)` uint8, and how many were looked at, 4,096 at most."""

    frames: Tensor
    total: int


def read_clip(source: str | bytes, wanted: int, fps: float | None = None) -> Decoded:
    """The frames of a video that a model sees, `(T, 3, H, W)` uint8, decoded once.

    Only they are kept in memory. Of a video that is longer than 4,096 frames, or 2^34 pixels, or never ends, what comes first is taken.

    Args:
        source: path of a file, or its content.
        wanted: frames `T`; a video that has fewer repeats some.
        fps: frames a second that the model was made for; None spreads the frames over the whole video.

    Raises:
        DataError: no video, none that can be decoded, a file of more than 4 GiB, frames of more than 2^26 pixels.
        MissingExtra: there is no PyAV.
    """
    try:
        import av
    except ImportError as error:
        raise MissingExtra("videos need PyAV: pip install 'hf-purify[video]'; frames as lists of images are read without") from error
    what = f"'{source}'" if isinstance(source, str) else "a video of the data set"
    source_of(source, "the video" if isinstance(source, str) else what, LARGEST)
    try:
        rate, total = _count(av, source, what)
        if not total:
            raise DataError(f"{what} holds no frame that can be decoded")
        step = rate / fps if rate and fps else None
        frames = _frames(av, source, spread(total, wanted, step), what)
    except DataError:
        raise
    except Exception as error:  # decoders fail in many ways
        raise DataError(
            f"{what} cannot be decoded as a video: {getattr(error, 'strerror', None) or error or type(error).__name__}"
        ) from error
    return Decoded(torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous(), total)


@contextlib.contextmanager
def _open(av: Any, source: str | bytes) -> Iterator[Any]:
    """A container that reads this file alone: a playlist in it can open no other."""
    with contextlib.ExitStack() as stack:
        file = io.BytesIO(source) if isinstance(source, bytes) else stack.enter_context(Path(source).open("rb"))
        yield stack.enter_context(av.open(file, options={"protocol_whitelist": "pipe", "format_whitelist": FORMATS}))


def _each(container: Any, what: str) -> Iterator[Any]:
    """The frames that are looked at. What the header says of their size and number is checked, and not believed.

    Raises:
        DataError: frames that are too large or of no sensible shape.
    """
    stream = container.streams.video[0]
    _check_frame(stream.width, stream.height, what)
    stream.codec_context.options = {"max_pixels": str(PIXELS)}  # a frame may be larger than the stream: the decoder refuses it unseen
    left = ALL_PIXELS
    for frame in itertools.islice(container.decode(stream), MOST):
        _check_frame(frame.width, frame.height, what)
        left -= frame.width * frame.height
        if left < 0:
            return
        yield frame


def _check_frame(width: int, height: int, what: str) -> None:
    if width * height > PIXELS:
        raise DataError(f"the frames of {what} have {width}x{height} pixels; {PIXELS} in all are the most")
    if max(width, height) > LONGEST * max(1, min(width, height)):
        raise DataError(f"the frames of {what} have {width}x{height} pixels; one side may be {LONGEST} times the other at most")


def _count(av: Any, source: str | bytes, what: str) -> tuple[float | None, int]:
    """Frames a second, if the file says so, and how many frames there are to look at."""
    with _open(av, source) as container:
        if not container.streams.video:
            raise DataError(f"{what} has no video stream")
        stream = container.streams.video[0]
        rate = float(stream.average_rate) if stream.average_rate else None
        return rate, sum(1 for _ in _each(container, what))


def _frames(av: Any, source: str | bytes, chosen: list[int], what: str) -> list[np.ndarray]:
    """The chosen frames `(H, W, 3)`, in order."""
    found: dict[int, np.ndarray] = {}
    with _open(av, source) as container:
        for i, frame in enumerate(_each(container, what)):
            if i in chosen:
                scale = min(1.0, SIDE / min(frame.width, frame.height))
                size = {"width": max(1, round(frame.width * scale)), "height": max(1, round(frame.height * scale))}
                found[i] = frame.reformat(**size, format="rgb24").to_ndarray()
            if i >= chosen[-1]:
                break
    return [found[i] for i in chosen]
