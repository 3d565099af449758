"""Patterns: seeded draws, patterns from files, and how they are fitted to a picture."""

from __future__ import annotations

import zipfile
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hf_purify.errors import ConfigError


def seeded(seed: int) -> torch.Generator:
    """A generator of its own for each draw: no global random state."""
    return torch.Generator().manual_seed(int(seed))


def as_channels(pattern: Tensor, picture: Tensor) -> Tensor:
    """A colour pattern `(3, h, w)` with as many channels as the picture: grey is the mean."""
    return pattern if picture.shape[0] == 3 else pattern.mean(0, keepdim=True)


def nearest(size: int, cells: int) -> Tensor:
    """The cell `(size,)` in which each pixel lies."""
    return torch.arange(size) * cells // size


@lru_cache(maxsize=16)
def read_pattern(path: str) -> Tensor:
    """The pattern `(3, h, w)` in 0..255 that a file holds."""
    try:
        if path.endswith((".npz", ".npy")):
            loaded = np.load(path, allow_pickle=False)
            array = np.asarray(loaded["x"] if path.endswith(".npz") else loaded)
        else:
            with Image.open(path) as image:
                array = np.asarray(image.convert("RGB"))
    except FileNotFoundError:
        raise ConfigError(f"trigger pattern '{path}' does not exist; give the path of a picture, .npz or .npy file") from None
    except KeyError:
        raise ConfigError(f"trigger pattern '{path}' must hold an array 'x', found {', '.join(loaded.files) or 'nothing'}") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, Image.DecompressionBombError) as error:
        raise ConfigError(f"trigger pattern '{path}' cannot be read as a picture, .npz or .npy file: {error}") from error
    if array.dtype.kind not in "uif" or array.ndim not in (2, 3) or 0 in array.shape:
        raise ConfigError(f"trigger pattern '{path}' must hold numbers (3, h, w), (h, w, 3) or (h, w), got {array.dtype} {array.shape}")
    array = array[None] if array.ndim == 2 else array
    array = array.transpose(2, 0, 1) if array.shape[0] not in (1, 3) and array.shape[2] in (1, 3) else array
    if array.shape[0] not in (1, 3):
        raise ConfigError(f"trigger pattern '{path}' must have 1 or 3 channels, got the shape {array.shape}")
    pattern = torch.from_numpy(np.array(array, dtype=np.float32)).expand(3, -1, -1)
    low, high = float(pattern.min()), float(pattern.max())
    if not (low >= 0 and high <= 255):
        raise ConfigError(f"trigger pattern '{path}' must lie in 0..255, got {low:g}..{high:g}")
    if array.dtype.kind == "f" and 0 < high <= 1:
        raise ConfigError(f"trigger pattern '{path}' must lie in 0..255, got {low:g}..{high:g}; multiply it by 255")
    return pattern
