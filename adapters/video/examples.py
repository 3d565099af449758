"""Clips of a data set, decoded once and prepared for a model once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import torch

from hf_purify.adapter import Loaded
from hf_purify.errors import DataError
from hf_purify.tables import Selection, find_column, open_data, read_each, stored_cells

from .._folders import FILE, files_in, table_of
from .._images import open_image
from .._prepared import PreparedExamples
from .._sources import source_of
from ..vision.examples import decode
from .clips import LARGEST, Decoded, read_clip, spread
from .loading import frames_of, preparer

VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")


class ClipExamples(PreparedExamples):
    """Clips `(T, 3, H, W)` of uint8 with labels `(n,)`, and what prepares them for the model."""

    key = "pixel_values"
    short = 0  # clips that had fewer frames than the model sees


def open_clips(data: Any, split: str | None = None, revision: str | None = None) -> datasets.Dataset:
    """Open clips: a folder of videos in folders of classes, or what `open_data` knows."""
    path = Path(str(data)).expanduser() if isinstance(data, (str, Path)) else None
    if path is not None and path.is_dir() and (videos := files_in(path, VIDEOS)):
        return table_of(path, videos, split)
    return open_data(data, split, revision)


def read_clips(data: Any, loaded: Loaded, classes: int, wanted: Selection, to_rgb: bool = False) -> ClipExamples:
    """Read clips and labels; only those that are drawn are decoded.

    Raises:
        DataError: a clip without frames or with frames of several sizes, a video that cannot be decoded; labels that do not fit.
    """
    opened, frames = open_clips(data, wanted.split, wanted.revision), frames_of(loaded)
    chosen, labels = wanted.labelled(opened, classes, loaded.labels, "clip")
    listed = FILE in opened.features and "video" not in wanted.columns
    name = FILE if listed else find_column(opened, wanted.columns.get("video"), "video", _is_clip)
    feature = opened.features[name]
    if not listed and not _is_clip(name, feature):
        raise DataError(f"column '{name}': expected lists of images or videos, got {feature}")
    cells, fps = stored_cells(opened, name), getattr(loaded.processor, "fps", None)
    mode = feature.feature.mode if _is_frames(feature) else None
    read = read_each(chosen, "decode clips", lambda i: _read(cells(i), frames, fps, mode, to_rgb, f"clip {i}"))
    found = ClipExamples([clip for clip, _ in read], labels, preparer(loaded.processor))
    found.short = sum(there < frames for _, there in read)
    return found


def _is_frames(feature: Any) -> bool:
    return isinstance(getattr(feature, "feature", None), datasets.Image)


def _is_clip(_: str, feature: Any) -> bool:
    return isinstance(feature, datasets.Video) or _is_frames(feature)


def _read(clip: Any, frames: int, fps: float | None, mode: str | None, to_rgb: bool, what: str) -> Decoded:
    """A clip as it is stored: a video, or a list of frames.

    Args:
        frames, fps: as in `read_clip`.
        mode, to_rgb: of the frames, as in `open_image` and `decode`.
        what: for messages.
    """
    if isinstance(clip, (str, bytes, Mapping)):
        return read_clip(source_of(clip, what, LARGEST), frames, fps)
    if not clip:
        raise DataError(f"{what} has no frames")
    seen = {i: decode(open_image(clip[i], f"frame {i} of {what}", mode), 3, to_rgb) for i in dict.fromkeys(spread(len(clip), frames))}
    sizes = {tuple(f.shape[1:]) for f in seen.values()}
    if len(sizes) > 1:
        raise DataError(f"{what} has frames of several sizes: {', '.join(f'{h}x{w}' for h, w in sorted(sizes))}; scale them alike")
    return Decoded(torch.stack([seen[i] for i in spread(len(clip), frames)]), len(clip))
