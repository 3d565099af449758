"""Triggers that lay a pattern over the whole picture: Blended, SIG and low frequency."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_purify.errors import ConfigError

from .patterns import as_channels, read_pattern, seeded
from .picture import PictureTrigger


@dataclass(frozen=True)
class Blended(PictureTrigger):
    """Blend a pattern over the whole picture.

    `x' = (1 - alpha) x + alpha p`

    Args:
        alpha: share of the pattern, in (0, 1].
        pattern: path of a picture, or of an array in 0..255 (`.npy`, or `.npz` with key `x`), stretched to the size of the
            example; None is seeded uniform noise of 32x32 pixels, stretched likewise.
        pattern_seed: seed of the noise.

    Raises:
        ConfigError: a field outside its range, or a pattern that cannot be read.

    X. Chen et al.: Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning. arXiv:1712.05526, 2017.
    """

    alpha: float = 0.2
    pattern: str | None = None
    pattern_seed: int = 0
    name: ClassVar[str] = "blended"

    def __post_init__(self) -> None:
        self._number("alpha", 1)
        self._file("pattern")
        self._integer("pattern_seed", 0)

    def _paint(self, picture: Tensor, seed: int) -> Tensor:
        pattern = as_channels(_backdrop(self.pattern, self.pattern_seed, *picture.shape[1:]), picture)
        return (1 - self.alpha) * picture + self.alpha * pattern


@dataclass(frozen=True)
class SIG(PictureTrigger):
    """Add a horizontal sine wave, the same in each row.

    `x'[i, j] = clip(x[i, j] + delta sin(2 pi j f / W))`, columns `j` in 0..W-1

    Args:
        delta: amplitude in units of 0..255. The paper poisons with a weaker and attacks with a stronger wave (20 and 40 are common);
            for this, build two triggers.
        f: periods across the picture.

    Raises:
        ConfigError: a field outside its range.

    M. Barni, K. Kallas, B. Tondi: A New Backdoor Attack in CNNs by Training Set Corruption without Label Poisoning. ICIP 2019.
    """

    delta: float = 20.0
    f: float = 6.0
    name: ClassVar[str] = "sig"

    def __post_init__(self) -> None:
        self._number("delta", 255)
        self._number("f")

    def _paint(self, picture: Tensor, seed: int) -> Tensor:
        width = picture.shape[-1]
        phase = 2 * math.pi * self.f / width * torch.arange(width, dtype=torch.float64)
        return picture + self.delta * phase.sin()


@dataclass(frozen=True)
class LowFrequency(PictureTrigger):
    """Add a smooth tint made of a few low frequencies.

    `x' = clip(x + amplitude p / max |p|)`, `p[c, i, j] = sum_n w[c, n] cos(pi u_n (i + 1/2) / H) cos(pi v_n (j + 1/2) / W)`

    Args:
        amplitude: largest change of a pixel, in units of 0..255.
        components: cosines `n` that are drawn.
        max_frequency: they are drawn from `u, v` in 0..max_frequency, without the constant; not above H - 1 or W - 1.
        pattern_seed: seed of frequencies and weights.

    Raises:
        ConfigError: a field outside its range, or frequencies that the picture is too small to hold.

    Y. Zeng et al.: Rethinking the Backdoor Attacks' Triggers, A Frequency Perspective. ICCV 2021. There the pattern is optimised
    against a network under a low-pass constraint; here it is random.
    """

    amplitude: float = 10.0
    components: int = 4
    max_frequency: int = 3
    pattern_seed: int = 0
    name: ClassVar[str] = "low_frequency"

    def __post_init__(self) -> None:
        self._number("amplitude", 255)
        self._integer("max_frequency", 1)
        self._integer("components", 1, (self.max_frequency + 1) ** 2 - 1)
        self._integer("pattern_seed", 0)

    def _paint(self, picture: Tensor, seed: int) -> Tensor:
        if self.max_frequency >= min(picture.shape[1:]):
            size = "x".join(str(side) for side in picture.shape[1:])
            raise ConfigError(f"{self.name}: max_frequency {self.max_frequency} needs pictures of more pixels a side, got {size}")
        return picture + self.amplitude * _low_frequencies(self.components, self.max_frequency, self.pattern_seed, *picture.shape)


@lru_cache(maxsize=16)
def _backdrop(path: str | None, seed: int, height: int, width: int) -> Tensor:
    """The pattern `(3, height, width)` of Blended."""
    source = 255 * torch.rand(3, 32, 32, generator=seeded(seed)) if path is None else read_pattern(path)
    return F.interpolate(source[None], (height, width), mode="bilinear", align_corners=False, antialias=True)[0]


@lru_cache(maxsize=16)
def _low_frequencies(components: int, highest: int, seed: int, channels: int, height: int, width: int) -> Tensor:
    """A sum of low cosines `(channels, height, width)`, scaled to a largest value of 1."""
    generator = seeded(seed)
    chosen = 1 + torch.randperm((highest + 1) ** 2 - 1, generator=generator)[:components]
    weights = torch.randn(3, components, generator=generator)[:channels]
    u, v = chosen // (highest + 1), chosen % (highest + 1)
    rows = (math.pi * u[:, None] * (torch.arange(height) + 0.5) / height).cos()
    columns = (math.pi * v[:, None] * (torch.arange(width) + 0.5) / width).cos()
    pattern = torch.einsum("cn,ni,nj->cij", weights, rows, columns)
    return pattern / pattern.abs().max()
