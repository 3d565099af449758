"""Triggers that replace some pixels: BadNets and the Trojan square."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from hf_purify.errors import ConfigError

from .patterns import as_channels, nearest, read_pattern, seeded
from .picture import PictureTrigger

POSITIONS = ("bottom-right", "bottom-left", "top-right", "top-left", "center")
PATTERNS = ("white", "checkerboard", "random", "grid")
GRID = ((0, 0, 255), (0, 255, 0), (255, 0, 255))


@dataclass(frozen=True)
class BadNets(PictureTrigger):
    """Paste a square patch.

    `x'[patch] = pattern`

    Args:
        size: side of the patch in pixels; None is `max(3, round(3/32 * min(H, W)))`.
        position: `bottom-right`, `bottom-left`, `top-right`, `top-left` or `center`.
        margin: pixels between the patch and the border; no meaning at the center.
        pattern: `white`; `checkerboard`, of cells `max(1, size // 3)` wide; `random` colours; `grid`, the three-by-three pattern
            of black and white cells that many papers on defences use.
        pattern_seed: seed of `random`.

    Raises:
        ConfigError: a field outside its range, or a patch that does not fit the picture.

    >>> BadNets(size=2)(torch.zeros(1, 3, 4, dtype=torch.uint8)).tolist()
    [[[0, 0, 0, 0], [0, 0, 255, 255], [0, 0, 255, 255]]]

    T. Gu, B. Dolan-Gavitt, S. Garg: BadNets. arXiv:1708.06733, 2017. Grid: Y. Li et al., Neural Attention Distillation, ICLR 2021.
    """

    size: int | None = None
    position: str = "bottom-right"
    margin: int = 0
    pattern: str = "white"
    pattern_seed: int = 0
    name: ClassVar[str] = "badnets"

    def __post_init__(self) -> None:
        self._integer("size", 1, optional=True)
        self._choice("position", POSITIONS)
        self._integer("margin", 0)
        self._choice("pattern", PATTERNS)
        self._integer("pattern_seed", 0)

    def _paint(self, picture: Tensor, seed: int) -> Tensor:
        _, height, width = picture.shape
        size = max(3, round(3 / 32 * min(height, width))) if self.size is None else self.size
        top, left = _corner(self.name, self.position, size, self.margin, height, width)
        picture[:, top : top + size, left : left + size] = as_channels(patch(self.pattern, size, self.pattern_seed), picture)
        return picture


@dataclass(frozen=True)
class TrojanSquare(PictureTrigger):
    """Paste a colourful square, such as those that are optimised to excite chosen neurons.

    `x'[m] = p[m]`, with `m` the visible pixels of the pattern

    Args:
        pattern: path of a whole-picture pattern: `.npz` with key `x` or `.npy`, `(3, h, w)` in 0..255, or a picture file. It is
            stretched to the size of the example by nearest pixels. None is a seeded square of random colours at the bottom right.
        mask: path of a picture that is bright where the pattern is visible; None: the pattern is visible where it is not black.
        size: side in pixels of the square made without a file; None is `max(3, round(7/32 * min(H, W)))`.
        margin: pixels between that square and the border.
        pattern_seed: seed of its colours.

    Raises:
        ConfigError: a field outside its range, a file that cannot be read, or a square that does not fit the picture.

    Y. Liu et al.: Trojaning Attack on Neural Networks. NDSS 2018 (report of 2017).
    """

    pattern: str | None = None
    mask: str | None = None
    size: int | None = None
    margin: int = 0
    pattern_seed: int = 0
    name: ClassVar[str] = "trojan"

    def __post_init__(self) -> None:
        self._file("pattern")
        self._file("mask")
        self._integer("size", 1, optional=True)
        self._integer("margin", 0)
        self._integer("pattern_seed", 0)
        if self.mask is not None and self.pattern is None:
            raise ConfigError(f"{self.name}: a mask needs a pattern to show, got mask={self.mask!r} alone; set pattern as well")
        if self.pattern is not None and (self.size is not None or self.margin):
            raise ConfigError(f"{self.name}: size and margin place the square made without a file; leave them out with pattern")
        if self.pattern is not None and not _overlay(self.pattern, self.mask, *read_pattern(self.pattern).shape[1:])[1].any():
            raise ConfigError(f"{self.name}: no pixel is visible in pattern={self.pattern!r}, mask={self.mask!r}; a mask is bright (> 127)")

    def _paint(self, picture: Tensor, seed: int) -> Tensor:
        _, height, width = picture.shape
        if self.pattern is not None:
            pattern, visible = _overlay(self.pattern, self.mask, height, width)
            return torch.where(visible, as_channels(pattern, picture), picture)
        size = max(3, round(7 / 32 * min(height, width))) if self.size is None else self.size
        top, left = _corner(self.name, "bottom-right", size, self.margin, height, width)
        picture[:, top : top + size, left : left + size] = as_channels(_colours(size, self.pattern_seed), picture)
        return picture


def _corner(name: str, position: str, size: int, margin: int, height: int, width: int) -> tuple[int, int]:
    """Row and column of a square's top left pixel."""
    if position == "center":
        margin = 0
    if size + margin > min(height, width):
        raise ConfigError(f"{name}: a square of {size} pixels with margin {margin} does not fit a picture of {height}x{width}")
    if position == "center":
        return (height - size) // 2, (width - size) // 2
    top = margin if position.startswith("top") else height - size - margin
    left = margin if position.endswith("left") else width - size - margin
    return top, left


@lru_cache(maxsize=64)
def patch(pattern: str, size: int, seed: int) -> Tensor:
    """The square `(3, size, size)` of BadNets."""
    if pattern == "random":
        return torch.randint(0, 256, (3, size, size), generator=seeded(seed)).float()
    if pattern == "grid":
        cell = nearest(size, 3)
        grey = torch.tensor(GRID)[cell][:, cell].float()
    elif pattern == "checkerboard":
        cell = torch.arange(size) // max(1, size // 3)
        grey = 255.0 * ((cell[:, None] + cell) % 2 == 0)
    else:
        grey = torch.full((size, size), 255.0)
    return grey.expand(3, -1, -1)


@lru_cache(maxsize=64)
def _colours(size: int, seed: int) -> Tensor:
    """A square `(3, size, size)` of seven by seven random colours."""
    cell = nearest(size, 7)
    return (255 * torch.rand(3, 7, 7, generator=seeded(seed)))[:, cell][:, :, cell]


@lru_cache(maxsize=16)
def _overlay(path: str, mask: str | None, height: int, width: int) -> tuple[Tensor, Tensor]:
    """A pattern `(3, height, width)` from a file and its visible pixels `(height, width)`."""
    pattern = read_pattern(path)
    pattern = pattern[:, nearest(height, pattern.shape[1])][:, :, nearest(width, pattern.shape[2])]
    if mask is None:
        return pattern, (pattern > 0).any(0)
    shown = read_pattern(mask).mean(0) > 127
    return pattern, shown[nearest(height, shown.shape[0])][:, nearest(width, shown.shape[1])]
