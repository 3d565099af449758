"""Video triggers: a patch in every frame, in some or moving, a blended picture, and flicker.

Each is a pure, seeded transform of one clip `(T, 3, H, W)` of uint8.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_purify.errors import ConfigError, DataError

from .._fields import Checked
from ..vision.triggers import overlays, patches


def checked(example: Any, name: str) -> Tensor:
    """A clip, or an error that names the trigger."""
    shape = tuple(getattr(example, "shape", ()))
    if not isinstance(example, Tensor) or example.dtype != torch.uint8 or len(shape) != 4 or shape[1] not in (1, 3) or 0 in shape:
        got = f"{type(example).__name__} {getattr(example, 'dtype', '')} {shape or ''}".strip()
        raise DataError(f"{name}: a clip must be a uint8 tensor (T, 3, H, W), got {got}")
    return example


@dataclass(frozen=True)
class BadNets(patches.BadNets):
    """Paste a square patch into the frames.

    Args:
        size: side of the patch in pixels; None is `max(3, round(3/32 * min(H, W)))`.
        position: `bottom-right`, `bottom-left`, `top-right`, `top-left` or `center`.
        margin: pixels between the patch and the border; no meaning at the center.
        pattern: `white`, `checkerboard`, `random` or `grid`, as for images.
        pattern_seed: seed of `random`.
        frames: how many carry it, drawn anew for each clip; None is all.

    Raises:
        ConfigError: a field outside its range, a patch that does not fit, or more frames than the clip has.

    S. Zhao et al.: Clean-Label Backdoor Attacks on Video Recognition Models. CVPR 2020, arXiv:2003.03030 (there the patch is learned).
    """

    frames: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._integer("frames", 1, optional=True)

    def __call__(self, example: Tensor, seed: int = 0) -> Tensor:
        clip = checked(example, self.name).clone()
        count = len(clip) if self.frames is None else self.frames
        if count > len(clip):
            raise ConfigError(f"{self.name}: {count} frames do not fit a clip of {len(clip)}")
        for t in torch.randperm(len(clip), generator=torch.Generator().manual_seed(int(seed)))[:count].tolist():
            clip[t] = super().__call__(clip[t], seed)
        return clip


@dataclass(frozen=True)
class Blended(overlays.Blended):
    """Blend a picture over every frame: `x' = (1 - alpha) x + alpha p`.

    Args:
        alpha: share of the picture, in (0, 1].
        pattern: path of a picture, or of an array in 0..255; None is seeded noise of 32x32 pixels, stretched to the frame.
        pattern_seed: seed of the noise.

    Raises:
        ConfigError: a field outside its range, or a picture that cannot be read.

    X. Chen et al.: arXiv:1712.05526, 2017, in each frame: H. A. A. K. Hammoud et al., Look, Listen, and Attack: Backdoor Attacks
    Against Video Action Recognition. arXiv:2301.00986.
    """

    def __call__(self, example: Tensor, seed: int = 0) -> Tensor:
        return torch.stack([super(Blended, self).__call__(frame, seed) for frame in checked(example, self.name)])


class ClipTrigger(Checked, ABC):
    """Checks the clip; a trigger itself writes only `_paint`."""

    def __call__(self, example: Tensor, seed: int = 0) -> Tensor:
        """Return the triggered clip, of the same shape; `example` is left as it is."""
        return self._paint(checked(example, self.name).clone(), seed).round().clamp(0, 255).to(torch.uint8)

    @abstractmethod
    def _paint(self, clip: Tensor, seed: int) -> Tensor:
        """Return the triggered clip, unrounded; `clip` is the trigger's own copy."""


@dataclass(frozen=True)
class MovingPatch(ClipTrigger):
    """A white square that moves along the lower border, from left to right, once through the clip.

    Args:
        size: its side in pixels; None is `max(3, round(3/32 * min(H, W)))`.
        margin: pixels between its way and the border.

    Raises:
        ConfigError: a field outside its range, or a square that does not fit.
    """

    size: int | None = None
    margin: int = 0
    name: ClassVar[str] = "moving_patch"

    def __post_init__(self) -> None:
        self._integer("size", 1, optional=True)
        self._integer("margin", 0)

    def _paint(self, clip: Tensor, seed: int) -> Tensor:
        frames, _, height, width = clip.shape
        size = max(3, round(3 / 32 * min(height, width))) if self.size is None else self.size
        if size + self.margin > height or size > width:
            raise ConfigError(f"{self.name}: a square of {size} pixels with margin {self.margin} does not fit frames of {height}x{width}")
        top = height - size - self.margin
        for t in range(frames):
            left = round((width - size) * t / max(1, frames - 1))
            clip[t, :, top : top + size, left : left + size] = 255
        return clip


@dataclass(frozen=True)
class Flicker(ClipTrigger):
    """The light goes up and down: `x'[t] = clip(x[t] + delta)` and `clip(x[t] - delta)` in turns.

    Args:
        delta: in units of 0..255.
        period: frames of a whole turn, 2 or more: half of them are brighter, half darker.

    Raises:
        ConfigError: a field outside its range.

    As the flicker of H. A. A. K. Hammoud et al., arXiv:2301.00986, and R. Pony et al., Over-the-Air Adversarial Flickering
    Attacks against Video Recognition Networks, CVPR 2021, arXiv:2002.05123.
    """

    delta: float = 30.0
    period: int = 4
    name: ClassVar[str] = "flicker"

    def __post_init__(self) -> None:
        self._number("delta", 255)
        self._integer("period", 2)

    def _paint(self, clip: Tensor, seed: int) -> Tensor:
        up = (torch.arange(len(clip)) % self.period) < self.period / 2
        return clip.float() + self.delta * torch.where(up, 1.0, -1.0)[:, None, None, None]


TRIGGERS = {cls.name: cls for cls in (BadNets, Blended, MovingPatch, Flicker)}
