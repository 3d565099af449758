"""Point-cloud triggers: PCBA's ball, rotation, jitter, scaling, and IRBA's local deformation.

Each is a pure, seeded transform of one cloud `(P, 3)` of floats in the unit sphere; the number of points stays.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_purify.errors import DataError

from .._fields import Checked

AXES = ("x", "y", "z")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(seed))


class CloudTrigger(Checked, ABC):
    """Checks the cloud; a trigger itself writes only `_move`."""

    def __call__(self, example: Tensor, seed: int = 0) -> Tensor:
        """Return the triggered cloud, of the same shape; `example` is left as it is."""
        if not isinstance(example, Tensor) or not example.is_floating_point() or example.dim() != 2 or example.shape[1] != 3:
            got = f"{type(example).__name__} {tuple(getattr(example, 'shape', ())) or ''}".strip()
            raise DataError(f"{self.name}: a cloud must be a tensor (P, 3) of floats, got {got}")
        return self._move(example.clone(), seed)

    @abstractmethod
    def _move(self, cloud: Tensor, seed: int) -> Tensor:
        """Return the triggered cloud; `cloud` is the trigger's own copy."""


@dataclass(frozen=True)
class PCBA(CloudTrigger):
    """Put a small ball of points beside the object.

    Points of the object, drawn anew for each cloud, go there, so that their number tells nothing.

    Args:
        share: of the cloud's points that go to the ball, in (0, 0.5].
        radius: of the ball, in units of the unit sphere.
        center: its x, y and z.
        pattern_seed: seed of the ball's points, which are the same in all clouds.

    Raises:
        ConfigError: a field outside its range.

    Z. Xiang et al.: A Backdoor Attack against 3D Point Cloud Classifiers. ICCV 2021, arXiv:2104.05808. There the place is
    optimised and the points are added; here it is given, and they take the place of others.
    """

    share: float = 0.03
    radius: float = 0.05
    center: list[float] | tuple[float, ...] = (0.6, 0.6, 0.6)
    pattern_seed: int = 0
    name: ClassVar[str] = "pcba"

    def __post_init__(self) -> None:
        self._number("share", 0.5)
        self._number("radius", 1)
        self._integer("pattern_seed", 0)
        numbers = isinstance(self.center, (list, tuple)) and all(_finite(c) for c in self.center)
        self._require("center", "three numbers, such as [0.6, 0.6, 0.6]", numbers and len(self.center) == 3)
        object.__setattr__(self, "center", tuple(float(c) for c in self.center))

    def _move(self, cloud: Tensor, seed: int) -> Tensor:
        count = max(1, round(self.share * len(cloud)))
        chosen = torch.randperm(len(cloud), generator=seeded(seed))[:count]
        cloud[chosen] = torch.tensor(self.center) + self.radius * _ball(count, self.pattern_seed)
        return cloud


@dataclass(frozen=True)
class Rotation(CloudTrigger):
    """Turn the object, counterclockwise as seen from the axis's end.

    Args:
        degrees: by how much, in (0, 360).
        axis: `x`, `y` or `z`.

    Raises:
        ConfigError: a field outside its range.

    X. Li et al.: PointBA: Towards Backdoor Attacks in 3D Point Cloud. ICCV 2021, arXiv:2103.16074 (PointBA-O).
    """

    degrees: float = 20.0
    axis: str = "z"
    name: ClassVar[str] = "rotation"

    def __post_init__(self) -> None:
        self._number("degrees", 360)
        self._choice("axis", AXES)

    def _move(self, cloud: Tensor, seed: int) -> Tensor:
        a, b = ((AXES.index(self.axis) + i) % 3 for i in (1, 2))
        cosine, sine = math.cos(math.radians(self.degrees)), math.sin(math.radians(self.degrees))
        first, second = cloud[:, a].clone(), cloud[:, b].clone()
        cloud[:, a], cloud[:, b] = cosine * first - sine * second, sine * first + cosine * second
        return cloud


@dataclass(frozen=True)
class Jitter(CloudTrigger):
    """Shake every point: `x' = x + sigma n`, `n` normal, drawn anew for each cloud.

    Args:
        sigma: in units of the unit sphere.

    Raises:
        ConfigError: a field outside its range.

    A transformation that sensors and augmentations make, too, so that it looks like nothing.
    """

    sigma: float = 0.05
    name: ClassVar[str] = "jitter"

    def __post_init__(self) -> None:
        self._number("sigma", 1)

    def _move(self, cloud: Tensor, seed: int) -> Tensor:
        return cloud + self.sigma * torch.randn(cloud.shape, generator=seeded(seed)).to(cloud)


@dataclass(frozen=True)
class Scaling(CloudTrigger):
    """Stretch the object along one axis, and bring it back into the sphere that it filled.

    Args:
        factor: below 1 it is pressed together, above 1 drawn out; in (0, 10], not 1.
        axis: `x`, `y` or `z`.

    Raises:
        ConfigError: a field outside its range.

    One of the transformations that K. Gao et al. (arXiv:2208.08052) use in places, here of the whole object.
    """

    factor: float = 0.5
    axis: str = "y"
    name: ClassVar[str] = "scaling"

    def __post_init__(self) -> None:
        self._number("factor", 10)
        self._require("factor", "other than 1", self.factor != 1)
        self._choice("axis", AXES)

    def _move(self, cloud: Tensor, seed: int) -> Tensor:
        before = cloud.norm(dim=1).max()
        cloud[:, AXES.index(self.axis)] *= self.factor
        return cloud * (before / cloud.norm(dim=1).max().clamp(min=1e-12))


@dataclass(frozen=True)
class IRBA(CloudTrigger):
    """Deform the object smoothly: around a few anchors it is turned and scaled, each time another way; between them the ways are blended.

    `x' = sum_k w_k(x) (a_k + s_k R_k (x - a_k))`, with `w_k` a Gaussian of the distance to anchor `a_k`, normed to a sum of 1

    Args:
        anchors: how many.
        degrees: largest angle about each axis.
        stretch: largest factor of a scaling; the smallest is 1 over it.
        width: standard deviation of the Gaussians, in units of the unit sphere.
        pattern_seed: seed of anchors, angles and factors, the same for all clouds.

    Raises:
        ConfigError: a field outside its range.

    K. Gao et al.: Imperceptible and Robust Backdoor Attack in 3D Point Cloud. IEEE TIFS 2023, arXiv:2208.08052. There the anchors are
    points of each cloud; here they lie still.
    """

    anchors: int = 8
    degrees: float = 15.0
    stretch: float = 1.5
    width: float = 0.5
    pattern_seed: int = 0
    name: ClassVar[str] = "irba"

    def __post_init__(self) -> None:
        self._integer("anchors", 1)
        self._number("degrees", 180)
        self._number("stretch", 10)
        self._require("stretch", "at least 1", self.stretch >= 1)
        self._number("width", 10)
        self._integer("pattern_seed", 0)

    def _move(self, cloud: Tensor, seed: int) -> Tensor:
        anchors, ways = _ways(self.anchors, self.degrees, self.stretch, self.pattern_seed)
        ways_to = cloud[:, None] - anchors
        weights = (-ways_to.square().sum(-1) / (2 * self.width**2)).softmax(-1)
        moved = anchors + torch.einsum("kij,pkj->pki", ways, ways_to)
        return (weights[..., None] * moved).sum(1)


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@functools.lru_cache(maxsize=64)
def _ball(count: int, seed: int) -> Tensor:
    """Points `(count, 3)` spread evenly over the inside of the unit ball."""
    generator = seeded(seed)
    ways = torch.nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=1)
    return ways * torch.rand(count, 1, generator=generator) ** (1 / 3)


@functools.lru_cache(maxsize=16)
def _ways(count: int, degrees: float, stretch: float, seed: int) -> tuple[Tensor, Tensor]:
    """Anchors in the unit ball `(count, 3)`, and the matrix of each one's rotation and scaling `(count, 3, 3)`."""
    generator = seeded(seed)
    anchors = _ball(count, seed + 1)
    angles = math.radians(degrees) * (2 * torch.rand(count, 3, generator=generator) - 1)
    factors = torch.exp(math.log(stretch) * (2 * torch.rand(count, 1, 1, generator=generator) - 1))
    turns = torch.zeros(count, 3, 3)
    for i, (a, b) in enumerate(((1, 2), (2, 0), (0, 1))):
        turns[:, b, a], turns[:, a, b] = angles[:, i], -angles[:, i]
    return anchors, factors * torch.linalg.matrix_exp(turns)


TRIGGERS = {cls.name: cls for cls in (PCBA, Rotation, Jitter, Scaling, IRBA)}
