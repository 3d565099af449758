"""Recovered point-cloud triggers of four kinds: a ball of points, a linear map, a smooth deformation, noise."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from hf_purify.adapter import Examples

from .._stand_ins import Look, OnInputs, rows

RADIUS = 0.05  # of a ball, as a share of half the range of a coordinate
GRID, BEST = 9, 4  # places along an axis that are tried, and of each class those around which more are
PROBES = 12  # clouds that they are tried in


class _Clouds(OnInputs):
    """Inputs are clouds `(B, P, 3)`."""

    key = "points"
    channels = -1


class Ball(_Clouds):
    """Some points, one in thirty-two, go to a small ball somewhere, the same in all clouds (after Xiang et al., ICCV 2021).

    Its place is what is recovered; number of points and radius are given, so that its size is the same always: 0. Far from a trigger's place
    no gradient leads there, so that places all over the sphere are tried first. (Points that go where they will, each by itself, are a short
    way to any class of a network that keeps maxima, and hide the backdoor's.)
    """

    offsets: Tensor

    def __init__(self, data: Examples, classes: Tensor, generator: torch.Generator, logits: Look) -> None:
        super().__init__(data, classes, generator, logits)
        found = _try_places(data, logits)
        half = (self.high - self.low) / 2
        self.register_buffer("offsets", (half * _ball(self.shape[0]))[0])
        earlier = [int((classes[:i] == c).sum()) for i, c in enumerate(classes)]  # the first trigger of a class begins at its best place
        best = torch.stack([found.places[int(c), i % found.places.shape[1]] for c, i in zip(classes, earlier, strict=True)])
        self.center = nn.Parameter(best.clamp(-0.98, 0.98).atanh() + 0.02 * torch.randn(len(classes), 3, generator=generator))

    @classmethod
    def look(cls, data: Examples, logits: Look) -> Tensor:
        return _try_places(data, logits).costs

    def change(self, points: Tensor, which: Tensor) -> Tensor:
        half = (self.high - self.low) / 2
        center = self.low + half * (1 + rows(self.center, which)[:, None].tanh())
        return torch.cat([points[:, : -len(self.offsets)], center + self.offsets], 1)

    def size(self) -> Tensor:
        return 0 * self.center.sum(1)

    def shrink(self, limits: Tensor) -> None:
        """There is nothing to shrink: a ball is as large as the others."""


class _Tried(NamedTuple):
    """The best places of a ball for each class `(K, 4, 3)`, as shares of half the range of each coordinate, and what the best one costs `(K,)`."""

    places: Tensor
    costs: Tensor


def _ball(points: int) -> Tensor:
    """The points of a ball about 0, in a cloud of so many."""
    count = max(4, points // 32)
    return RADIUS * F.normalize(torch.randn(count, 3, generator=torch.Generator().manual_seed(0)), dim=1)


@torch.no_grad()
def _try_places(data: Examples, logits: Look) -> _Tried:
    """Put a ball at places all over the sphere in a few clouds, and then around the best of each class: how the losses towards it fall."""
    batch = data.batch(torch.arange(min(PROBES, len(data))))
    points = batch["points"].float()
    whole = data.batch(torch.arange(min(len(data), 512)))["points"].float()
    low, half = whole.amin((0, 1)), (whole.amax((0, 1)) - whole.amin((0, 1))) / 2
    ball = half * _ball(points.shape[1])
    kept = points[:, : -len(ball)]

    def losses(places: Tensor) -> Tensor:
        """Mean loss towards each class over clouds of other classes, `(n, K)`."""
        found = []
        for some in tqdm(places.split(max(1, 256 // len(points))), desc="try places", delay=2.0, leave=False, disable=None):
            balls = (low + half * (1 + some))[:, None, None] + ball
            clouds = torch.cat([kept.expand(len(some), *kept.shape), balls.expand(-1, len(points), -1, -1)], 2).flatten(0, 1)
            labels = batch["labels"].repeat(len(some))
            log_p = logits({"points": clouds.to(batch["points"]), "labels": labels}).float().log_softmax(-1).cpu()
            others = (labels[:, None] != torch.arange(log_p.shape[1])).float()
            sums = [(x * others).view(len(some), len(points), -1).sum(1) for x in (-log_p, torch.ones_like(log_p))]
            found.append(sums[0] / sums[1].clamp(min=1))
        return torch.cat(found)

    axis = torch.linspace(-1, 1, GRID)
    places = torch.cartesian_prod(axis, axis, axis)
    places = places[places.norm(dim=1) <= 1.1]
    found = losses(places)
    best = found.topk(BEST, dim=0, largest=False).indices  # (BEST, K)
    steps = torch.cartesian_prod(*[torch.tensor([-0.5, 0.0, 0.5])] * 3) * float(axis[1] - axis[0])
    near = (places[best.unique()][:, None] + steps).reshape(-1, 3).clamp(-1, 1)
    places, found = torch.cat([places, near]), torch.cat([found, losses(near)])
    best = found.topk(BEST, dim=0, largest=False).indices.T
    return _Tried(places[best], found.gather(0, best.T)[0])


class Linear(_Clouds):
    """`x (I + D)`: turned, stretched or sheared, and brought back into the sphere that the cloud filled. Size: root mean square of `D`."""

    knob = "shear"
    scaled = True

    def __init__(self, data: Examples, classes: Tensor, generator: torch.Generator, logits: Look) -> None:
        super().__init__(data, classes, generator, logits)
        self.shear = nn.Parameter(0.02 * torch.randn(len(classes), 3, 3, generator=generator))

    def change(self, points: Tensor, which: Tensor) -> Tensor:
        moved = points + torch.bmm(points, rows(self.shear, which))
        return moved * (_radius(points) / _radius(moved).clamp(min=1e-6))

    def size(self) -> Tensor:
        return self.shear.square().mean((1, 2)).sqrt()


class Deformation(_Clouds):
    """A smooth field moves the points: shifts on a grid of 4 x 4 x 4, blended between. Size: root mean square of the shifts."""

    late = True
    knob = "shifts"
    scaled = True
    grid = 4
    reach = 0.25  # of half the range of a coordinate

    def __init__(self, data: Examples, classes: Tensor, generator: torch.Generator, logits: Look) -> None:
        super().__init__(data, classes, generator, logits)
        self.shifts = nn.Parameter(0.05 * torch.randn(len(classes), 3, *[self.grid] * 3, generator=generator))

    def change(self, points: Tensor, which: Tensor) -> Tensor:
        half = (self.high - self.low) / 2
        places = (points - self.low) / half.clamp(min=1e-6) - 1
        field = self.reach * rows(self.shifts, which).tanh()
        found = F.grid_sample(field, places[:, None, None], padding_mode="border", align_corners=True)
        return points + half * found[:, :, 0, 0].transpose(1, 2)

    def size(self) -> Tensor:
        return self.reach * self.shifts.tanh().square().mean((1, 2, 3, 4)).sqrt()


class Noise(_Clouds):
    """Every point is shaken, each time anew. Size: standard deviation, as a share of half the largest range of a coordinate."""

    late = True
    knob = "spread"

    def __init__(self, data: Examples, classes: Tensor, generator: torch.Generator, logits: Look) -> None:
        super().__init__(data, classes, generator, logits)
        self.spread = nn.Parameter(torch.full((len(classes),), -5.0))
        self.begin_draws(generator)

    def change(self, points: Tensor, which: Tensor) -> Tensor:
        noise = torch.randn(points.shape, generator=self.next_draw()).to(points)
        half = ((self.high - self.low) / 2).max()
        return points + half * rows(self.size(), which)[:, None, None] * noise

    def size(self) -> Tensor:
        return self.spread.sigmoid()


def _radius(points: Tensor) -> Tensor:
    """Distance of each cloud's farthest point, `(B, 1, 1)`."""
    return points.norm(dim=2).amax(1)[:, None, None]
