"""Image triggers: BadNets, Blended, SIG, Trojan square, WaNet, low frequency, BPP.

Each is a pure, seeded transform of one uint8 picture `(3, H, W)` or `(1, H, W)`, at any size. What does not depend on the picture
(patches, patterns, warping grids) is made once and cached; a pattern file is read when the trigger is built, not when it is used.
"""

from __future__ import annotations

import math
import zipfile
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from hf_purify.errors import ConfigError, DataError, did_you_mean, unknown

POSITIONS = ("bottom-right", "bottom-left", "top-right", "top-left", "center")
PATTERNS = ("white", "checkerboard", "random", "grid")
GRID = ((0, 0, 255), (0, 255, 0), (255, 0, 255))
DITHER = ((1, 0, 7 / 16), (1, 1, 3 / 16), (2, 1, 5 / 16), (3, 1, 1 / 16))  # (wavefronts ahead, rows below, share of the error)


class _PictureTrigger(ABC):
    """Checks and converts the picture; a trigger itself writes only `_paint`, on floats in 0..255."""

    name: ClassVar[str]

    def __call__(self, example: Tensor, seed: int = 0) -> Tensor:
        """Return the triggered picture, of the same shape and dtype; `example` is left as it is."""
        return _to_uint8(self._paint(_to_float(example, self.name), seed))

    @abstractmethod
    def _paint(self, picture: Tensor, seed: int) -> Tensor:
        """Return the triggered picture, unrounded; `picture` is the trigger's own copy."""

    def _require(self, field: str, expected: str, fulfilled: bool) -> None:
        if not fulfilled:
            raise ConfigError(f"{self.name}: {field} must be {expected}, got {getattr(self, field)!r}")

    def _integer(self, field: str, low: int, high: int | None = None, optional: bool = False) -> None:
        value = getattr(self, field)
        if optional and value is None:
            return
        whole = isinstance(value, int) and not isinstance(value, bool)
        expected = f"an integer of at least {low}" if high is None else f"an integer in {low}..{high}"
        self._require(field, expected + (" or None" if optional else ""), whole and low <= value and (high is None or value <= high))

    def _number(self, field: str, high: float = math.inf) -> None:
        value = getattr(self, field)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        expected = "a number above 0" if high == math.inf else f"a number in (0, {high:g}]"
        self._require(field, expected, number and 0 < value <= high and math.isfinite(value))

    def _choice(self, field: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, field)
        if value not in choices:
            raise ConfigError(f"{self.name}: {field} must be one of {', '.join(choices)}, got {value!r}{did_you_mean(value, choices)}")

    def _file(self, field: str) -> None:
        value = getattr(self, field)
        if value is None:
            return
        self._require(field, "a path or None", isinstance(value, (str, Path)))
        object.__setattr__(self, field, str(value))
        _read_pattern(str(value))


@dataclass(frozen=True)
class BadNets(_PictureTrigger):
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
        picture[:, top : top + size, left : left + size] = _as_channels(_patch(self.pattern, size, self.pattern_seed), picture)
        return picture


@dataclass(frozen=True)
class Blended(_PictureTrigger):
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
        pattern = _as_channels(_backdrop(self.pattern, self.pattern_seed, *picture.shape[1:]), picture)
        return (1 - self.alpha) * picture + self.alpha * pattern


@dataclass(frozen=True)
class SIG(_PictureTrigger):
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
class TrojanSquare(_PictureTrigger):
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
        if self.pattern is not None and not _overlay(self.pattern, self.mask, *_read_pattern(self.pattern).shape[1:])[1].any():
            raise ConfigError(f"{self.name}: no pixel is visible in pattern={self.pattern!r}, mask={self.mask!r}; a mask is bright (> 127)")

    def _paint(self, picture: Tensor, seed: int) -> Tensor:
        _, height, width = picture.shape
        if self.pattern is not None:
            pattern, visible = _overlay(self.pattern, self.mask, height, width)
            return torch.where(visible, _as_channels(pattern, picture), picture)
        size = max(3, round(7 / 32 * min(height, width))) if self.size is None else self.size
        top, left = _corner(self.name, "bottom-right", size, self.margin, height, width)
        picture[:, top : top + size, left : left + size] = _as_channels(_colours(size, self.pattern_seed), picture)
        return picture


@dataclass(frozen=True)
class WaNet(_PictureTrigger):
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
        picture = _to_float(example, self.name)
        _, height, width = picture.shape
        noise = 2 * torch.rand(height, width, 2, generator=_generator(seed)) - 1
        grid = self._grid(picture) + noise / torch.tensor([width, height])
        return _to_uint8(_warp(picture, grid.clamp(-1, 1)))

    def _grid(self, picture: Tensor) -> Tensor:
        return _warping_grid(self.k, self.strength, self.grid_seed, *picture.shape[1:])

    def _paint(self, picture: Tensor, seed: int) -> Tensor:
        return _warp(picture, self._grid(picture))


@dataclass(frozen=True)
class LowFrequency(_PictureTrigger):
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


@dataclass(frozen=True)
class BPP(_PictureTrigger):
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
        picture = _to_float(example, self.name)
        channels, height, width = picture.shape
        coarse = 255 * torch.rand(1, channels, 8, 8, generator=_generator(seed))
        other = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)[0].clamp(0, 255).round()
        return _to_uint8(picture + self._paint(other, seed) - other)

    def _paint(self, picture: Tensor, seed: int) -> Tensor:
        step = 255 / (2**self.bits - 1)
        if not self.dither:
            return (torch.round(picture / step) * step).round()
        return torch.from_numpy(_floyd_steinberg(picture.numpy(), step)).round()


TRIGGERS = {cls.name: cls for cls in (BadNets, Blended, SIG, TrojanSquare, WaNet, LowFrequency, BPP)}


def make_trigger(name: str, **options: Any) -> _PictureTrigger:
    """Build an image trigger by name.

    Args:
        name: one of `TRIGGERS`.
        options: fields of that trigger.

    Raises:
        UnknownName: no such trigger, or no such option.
        ConfigError: an option outside its range.

    >>> make_trigger("badnets", size=4, pattern="grid").size
    4
    """
    if name not in TRIGGERS:
        raise unknown("image trigger", name, TRIGGERS)
    cls = TRIGGERS[name]
    known = [field.name for field in fields(cls)]
    for option in options:
        if option not in known:
            raise unknown(f"option of trigger '{name}'", option, known)
    return cls(**options)


def _to_float(example: Any, name: str) -> Tensor:
    shape = tuple(getattr(example, "shape", ()))
    if not isinstance(example, Tensor) or example.dtype != torch.uint8 or len(shape) != 3 or shape[0] not in (1, 3) or 0 in shape:
        got = f"{type(example).__name__} {getattr(example, 'dtype', '')} {shape or ''}".strip()
        raise DataError(f"{name}: a picture must be a uint8 tensor (3, H, W) or (1, H, W), got {got}")
    return example.float()


def _to_uint8(picture: Tensor) -> Tensor:
    return picture.round().clamp(0, 255).to(torch.uint8)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(seed))


def _as_channels(pattern: Tensor, picture: Tensor) -> Tensor:
    """A colour pattern `(3, h, w)` with as many channels as the picture: grey is the mean."""
    return pattern if picture.shape[0] == 3 else pattern.mean(0, keepdim=True)


def _nearest(size: int, cells: int) -> Tensor:
    """The cell `(size,)` in which each pixel lies."""
    return torch.arange(size) * cells // size


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
def _patch(pattern: str, size: int, seed: int) -> Tensor:
    """The square `(3, size, size)` of BadNets."""
    if pattern == "random":
        return torch.randint(0, 256, (3, size, size), generator=_generator(seed)).float()
    if pattern == "grid":
        cell = _nearest(size, 3)
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
    cell = _nearest(size, 7)
    return (255 * torch.rand(3, 7, 7, generator=_generator(seed)))[:, cell][:, :, cell]


@lru_cache(maxsize=16)
def _read_pattern(path: str) -> Tensor:
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


@lru_cache(maxsize=16)
def _backdrop(path: str | None, seed: int, height: int, width: int) -> Tensor:
    """The pattern `(3, height, width)` of Blended."""
    source = 255 * torch.rand(3, 32, 32, generator=_generator(seed)) if path is None else _read_pattern(path)
    return F.interpolate(source[None], (height, width), mode="bilinear", align_corners=False, antialias=True)[0]


@lru_cache(maxsize=16)
def _overlay(path: str, mask: str | None, height: int, width: int) -> tuple[Tensor, Tensor]:
    """A pattern `(3, height, width)` from a file and its visible pixels `(height, width)`."""
    pattern = _read_pattern(path)
    pattern = pattern[:, _nearest(height, pattern.shape[1])][:, :, _nearest(width, pattern.shape[2])]
    if mask is None:
        return pattern, (pattern > 0).any(0)
    shown = _read_pattern(mask).mean(0) > 127
    return pattern, shown[_nearest(height, shown.shape[0])][:, _nearest(width, shown.shape[1])]


@lru_cache(maxsize=16)
def _warping_grid(k: int, strength: float, seed: int, height: int, width: int) -> Tensor:
    """Where each pixel is taken from: `(height, width, 2)`, x before y, in [-1, 1]."""
    control = 2 * torch.rand(1, 2, k, k, generator=_generator(seed)) - 1
    control = control / control.abs().mean()
    field = F.interpolate(control, (height, width), mode="bicubic", align_corners=True)[0].permute(1, 2, 0)
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    return (torch.stack((x, y), -1) + strength * field / torch.tensor([width, height])).clamp(-1, 1)


def _warp(picture: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(picture[None], grid[None], mode="bilinear", align_corners=True)[0]


@lru_cache(maxsize=16)
def _low_frequencies(components: int, highest: int, seed: int, channels: int, height: int, width: int) -> Tensor:
    """A sum of low cosines `(channels, height, width)`, scaled to a largest value of 1."""
    generator = _generator(seed)
    chosen = 1 + torch.randperm((highest + 1) ** 2 - 1, generator=generator)[:components]
    weights = torch.randn(3, components, generator=generator)[:channels]
    u, v = chosen // (highest + 1), chosen % (highest + 1)
    rows = (math.pi * u[:, None] * (torch.arange(height) + 0.5) / height).cos()
    columns = (math.pi * v[:, None] * (torch.arange(width) + 0.5) / width).cos()
    pattern = torch.einsum("cn,ni,nj->cij", weights, rows, columns)
    return pattern / pattern.abs().max()


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
