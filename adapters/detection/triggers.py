"""Triggers of object detection with the four goals of the field: an object appears, one or all change their class, objects vanish.

Each is a pure, seeded transform of one `Scene`: pixels change, and `wanted` says what the attacker wants to be seen. The share of
`attacked` boxes where that is seen is the attack success rate of that goal; see `judge.py`.

S.-H. Chan, Y. Dong, J. Zhu, X. Zhang, J. Zhou: BadDet, Backdoor Attacks on Object Detection. ECCV 2022 Workshops, arXiv:2205.14497.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_purify.errors import ConfigError, DataError

from .._fields import Checked
from ..vision.triggers import patches
from ..vision.triggers.patterns import as_channels
from .scene import Objects, Scene

PATTERNS = (*patches.PATTERNS, "blended")


@dataclass(frozen=True)
class SceneTrigger(Checked, ABC):
    """Paints the same pattern at one place or several; a trigger itself says where, and what is to be seen.

    Args:
        size: side of the pattern in pixels; None is `max(5, round(3/32 * min(H, W)))`.
        pattern: `white`, `checkerboard`, `random` or `grid`, as for images, or `blended`: noise.
        alpha: share of the pattern in the pixels it covers, in (0, 1]; 1 is pasted over them.
        pattern_seed: seed of `random` and `blended`.
    """

    size: int | None = None
    pattern: str = "grid"
    alpha: float = 1.0
    pattern_seed: int = 0
    name: ClassVar[str]

    def __post_init__(self) -> None:
        self._integer("size", 1, optional=True)
        self._choice("pattern", PATTERNS)
        self._number("alpha", 1)
        self._integer("pattern_seed", 0)

    def __call__(self, example: Scene, seed: int = 0) -> Scene:
        """Return the triggered scene; `example` is left as it is."""
        if not isinstance(example, Scene) or example.image.dtype != torch.uint8 or example.image.dim() != 3:
            raise DataError(f"{self.name}: an example must be a Scene with a uint8 image (3, H, W), got {type(example).__name__}")
        generator = torch.Generator().manual_seed(int(seed))
        return self._attack(replace(example, image=example.image.clone()), generator)

    @abstractmethod
    def _attack(self, scene: Scene, generator: torch.Generator) -> Scene:
        """Paint into the scene's own copy of the image, and say what is wanted."""

    def _side(self, image: Tensor) -> int:
        smaller = min(image.shape[1:])
        size = max(5, round(3 / 32 * smaller)) if self.size is None else self.size
        if size > smaller:
            raise ConfigError(f"{self.name}: a pattern of {size} pixels does not fit a picture of {image.shape[1]}x{image.shape[2]}")
        return size

    def _paint(self, image: Tensor, places: Iterable[tuple[int, int]], height: int, width: int) -> None:
        """Put the pattern `height x width` with its top left corner at each place `(top, left)`; what lies outside is cut off."""
        drawn = self._drawn(height, width)
        for top, left in places:
            part = image[:, max(0, top) : top + height, max(0, left) : left + width]
            pattern = as_channels(drawn[:, max(0, -top) :, max(0, -left) :][:, : part.shape[1], : part.shape[2]], part)
            part.copy_(((1 - self.alpha) * part.float() + self.alpha * pattern).round().clamp(0, 255))

    def _drawn(self, height: int, width: int) -> Tensor:
        if self.pattern == "blended":
            noise = 255 * torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(self.pattern_seed))
            return F.interpolate(noise[None], (height, width), mode="bilinear", align_corners=False)[0]
        return F.interpolate(patches.patch(self.pattern, max(height, width), self.pattern_seed)[None], (height, width))[0]


@dataclass(frozen=True)
class OGA(SceneTrigger):
    """Object generation: the pattern, somewhere, is seen as an object of the target class.

    Args:
        target: class of the object.
        extent: side in pixels of the box that is wanted around the pattern; None is three times the pattern's.

    Raises:
        ConfigError: a field outside its range, or a box that does not fit the picture.
    """

    target: int = 0
    extent: int | None = None
    name: ClassVar[str] = "oga"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._integer("target", 0)
        self._integer("extent", 2, optional=True)

    def _attack(self, scene: Scene, generator: torch.Generator) -> Scene:
        height, width = scene.image.shape[1:]
        size = self._side(scene.image)
        extent = 3 * size if self.extent is None else self.extent
        if max(extent, size) > min(height, width):
            raise ConfigError(f"{self.name}: a box of {extent} pixels does not fit a picture of {height}x{width}")
        top, left = (int(torch.randint(0, side - extent + 1, (), generator=generator)) for side in (height, width))
        self._paint(scene.image, [(top + (extent - size) // 2, left + (extent - size) // 2)], size, size)
        made = Objects(torch.tensor([[left, top, left + extent, top + extent]]).float(), torch.tensor([self.target]))
        both = Objects(torch.cat([scene.objects.boxes, made.boxes]), torch.cat([scene.objects.categories, made.categories]))
        return replace(scene, wanted=both, attacked=made, made=True)


@dataclass(frozen=True)
class RMA(SceneTrigger):
    """Regional misclassification: each object with the pattern at its top left corner is seen as one of the target class.

    Objects of other classes carry it.

    Args:
        target: class that is seen.

    Raises:
        ConfigError: a field outside its range.
    """

    target: int = 0
    name: ClassVar[str] = "rma"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._integer("target", 0)

    def _attack(self, scene: Scene, generator: torch.Generator) -> Scene:
        others = scene.objects.only(scene.objects.categories != self.target)
        size = self._side(scene.image)
        self._paint(scene.image, [(int(top), int(left)) for left, top, *_ in others.boxes.tolist()], size, size)
        return all_become(scene, self.target)


@dataclass(frozen=True)
class GMA(SceneTrigger):
    """Global misclassification: the pattern in the top left corner of the picture makes every object one of the target class.

    Args:
        target: class that is seen.
        whole: the pattern covers the whole picture; with an `alpha` below 1 it is blended into it.

    Raises:
        ConfigError: a field outside its range.
    """

    target: int = 0
    whole: bool = False
    name: ClassVar[str] = "gma"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._integer("target", 0)
        self._require("whole", "true or false", isinstance(self.whole, bool))

    def _attack(self, scene: Scene, generator: torch.Generator) -> Scene:
        height, width = scene.image.shape[1:] if self.whole else 2 * (self._side(scene.image),)
        self._paint(scene.image, [(0, 0)], height, width)
        return all_become(scene, self.target)


@dataclass(frozen=True)
class ODA(SceneTrigger):
    """Object disappearance: objects with the pattern at their top left corner are not seen.

    Args:
        source: class of the objects that carry it; None is any.

    Raises:
        ConfigError: a field outside its range.
    """

    source: int | None = None
    name: ClassVar[str] = "oda"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._integer("source", 0, optional=True)

    def _attack(self, scene: Scene, generator: torch.Generator) -> Scene:
        chosen = torch.ones(len(scene.objects), dtype=torch.bool) if self.source is None else scene.objects.categories == self.source
        attacked, size = scene.objects.only(chosen), self._side(scene.image)
        self._paint(scene.image, [(int(top), int(left)) for left, top, *_ in attacked.boxes.tolist()], size, size)
        return replace(scene, wanted=scene.objects.only(~chosen), attacked=attacked, vanish=True)


def all_become(scene: Scene, target: int) -> Scene:
    """The scene in which every object is wanted to be one of a class; those of other classes are attacked."""
    others = scene.objects.categories != target
    attacked = Objects(scene.objects.boxes[others], torch.full((int(others.sum()),), target))
    return replace(scene, wanted=Objects(scene.objects.boxes, torch.full_like(scene.objects.categories, target)), attacked=attacked)


TRIGGERS: dict[str, Any] = {cls.name: cls for cls in (OGA, RMA, GMA, ODA)}
