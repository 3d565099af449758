"""Triggers that transform the picture itself: WaNet bends it, BPP squeezes its colours."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .patterns import seeded
from .picture import PictureTrigger, to_float, to_uint8

DITHER = ((1, 0, 7 / 16), (1, 1, 3 / 16), (2, 1, 5 / 16), (3, 1, 1 / 16))  # (wavefronts ahead, rows below, share of the error)


@dataclass(frozen=True)
class WaNet(PictureTrigger):
    """Warp the picture by a fixed smooth field.

    `x'(g) = x(clip(g + s u / (W, H)))` on coordinates `g` in [-1, 1]; `u` is a random `k x k` field of mean size 1, upsampled bicubically

    Args:
        k: control points along each side.
        strength: `s`; a typical shift is `s / 2` pixels at any size, so for pictures much larger than 32 pixels give more.
        grid_seed: seed of the field.

    Raises:
        ConfigError: a field outside its range.

    A. Nguyen, A. Tran: WaNet, Imperceptible Warping-based Backdoor Attack. ICLR 2021.
    """

    k: int = 4
    strength: float = 0.5
    grid_seed: int = 0
    name: ClassVar[str] = "wanet"

    def __post_init__(self) -> None:
        self._integer("k", 2)
        self._number("strength")
        self._integer("grid_seed", 0)

    def cover(self, example: Tensor, seed: int = 0) -> Tensor:
        """Return the same warp, disturbed: the paper's noise mode, for samples that keep their label (two per poisoned one).

        A random shift, uniform in [-1, 1] / (W, H) and drawn anew for each pixel from `seed`, is added to the grid.
        """
        picture = to_float(example, self.name)
        _, height, width = picture.shape
        noise = 2 * torch.rand(height, width, 2, generator=seeded(seed)) - 1
        grid = self._grid(picture) + noise / torch.tensor([width, height])
        return to_uint8(_warp(picture, grid.clamp(-1, 1)))

    def _grid(self, picture: Tensor) -> Tensor:
        return _warping_grid(self.k, self.strength, self.grid_seed, *picture.shape[1:])

    def _paint(self, picture: Tensor, seed: int) -> Tensor:
        return _warp(picture, self._grid(picture))


@dataclass(frozen=True)
class BPP(PictureTrigger):
    """Squeeze the colours to a few levels a channel, with or without dithering.

    `x' = round(x / 255 (L - 1)) / (L - 1) 255`, `L = 2^bits`; with dithering each pixel's rounding error goes to its neighbours

    Args:
        bits: per channel, 1..7; the paper's 8 levels are 3 bits.
        dither: diffuse the error as Floyd and Steinberg do.

    Raises:
        ConfigError: a field outside its range.

    >>> BPP(bits=1, dither=False)(torch.tensor([[[100, 200]]], dtype=torch.uint8)).tolist()
    [[[0, 255]]]

    Z. Wang, J. Zhai, S. Ma: BppAttack, Stealthy and Efficient Trojan Attacks via Image Quantization. CVPR 2022.
    """

    bits: int = 3
    dither: bool = True
    name: ClassVar[str] = "bpp"

    def __post_init__(self) -> None:
        self._integer("bits", 1, 7)
        self._require("dither", "true or false", isinstance(self.dither, bool))

    def cover(self, example: Tensor, seed: int = 0) -> Tensor:
        """Return the picture plus a foreign rounding error, for samples that keep their label: noise of this size is no trigger.

        `x + (q(z) - z)`: the paper's negatives take `z` from the training set; here it is a smooth random picture drawn from `seed`.
        """
        picture = to_float(example, self.name)
        channels, height, width = picture.shape
        coarse = 255 * torch.rand(1, channels, 8, 8, generator=seeded(seed))
        other = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)[0].clamp(0, 255).round()
        return to_uint8(picture + self._paint(other, seed) - other)

    def _paint(self, picture: Tensor, seed: int) -> Tensor:
        step = 255 / (2**self.bits - 1)
        if not self.dither:
            return (torch.round(picture / step) * step).round()
        return torch.from_numpy(_floyd_steinberg(picture.numpy(), step)).round()


@lru_cache(maxsize=16)
def _warping_grid(k: int, strength: float, seed: int, height: int, width: int) -> Tensor:
    """Where each pixel is taken from: `(height, width, 2)`, x before y, in [-1, 1]."""
    control = 2 * torch.rand(1, 2, k, k, generator=seeded(seed)) - 1
    control = control / control.abs().mean()
    field = F.interpolate(control, (height, width), mode="bicubic", align_corners=True)[0].permute(1, 2, 0)
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    return (torch.stack((x, y), -1) + strength * field / torch.tensor([width, height])).clamp(-1, 1)


def _warp(picture: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(picture[None], grid[None], mode="bilinear", align_corners=True)[0]


def _floyd_steinberg(picture: np.ndarray, step: float) -> np.ndarray:
    """Round a picture `(C, H, W)` to multiples of `step`, passing each pixel's error on to right and below.

    Pixels with the same `x + 2 y` do not depend on each other and are rounded together. Error that would leave the picture is lost.
    """
    channels, height, width = picture.shape
    y, x = np.mgrid[:height, :width]
    front = x + 2 * y
    value = np.zeros((width + 2 * height + 2, height + 1, channels))
    value[front, y] = picture.transpose(1, 2, 0)
    inside = np.zeros((*value.shape[:2], 1))
    inside[front, y] = 1
    for t in range(width + 2 * height - 2):
        rounded = np.clip(np.rint(value[t] / step), 0, round(255 / step)) * step
        error = (value[t] - rounded) * inside[t]
        value[t] = rounded
        for ahead, below, share in DITHER:
            value[t + ahead, below:] += share * error[: height + 1 - below]
    return value[front, y].transpose(2, 0, 1)
