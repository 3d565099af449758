"""Recovered point-cloud triggers of four kinds: added points, a linear map, a smooth deformation, noise."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_purify.adapter import Batch, Examples, StandIn

Look = Callable[[Batch], Tensor]


class _Clouds(StandIn):
    """Knows the range of the inputs: `low` and `high` are `(3,)`."""

    low: Tensor
    high: Tensor

    def __init__(self, data: Examples, classes: Tensor, generator: torch.Generator, logits: Look) -> None:
        super().__init__(data, classes, generator, logits)
        points = data.batch(torch.arange(min(len(data), 512)))["points"].float()
        self.points = points.shape[1]
        self.register_buffer("low", points.amin((0, 1)))
        self.register_buffer("high", points.amax((0, 1)))

    def place(self, batch: Batch, which: Tensor) -> Batch:
        points = batch["points"]
        return {**batch, "points": self.change(points.float(), which.to(self.low.device)).to(points)}

    @abstractmethod
    def change(self, points: Tensor, which: Tensor) -> Tensor:
        """Clouds `(B, P, 3)` with trigger `which[i]` on cloud `i`."""


class AddedPoints(_Clouds):
    """Some points, one in sixteen, go to places of the trigger's own, each as far as its gate in [0, 1] says (after Xiang et al., ICCV 2021).

    Size: mean of the gates.
    """

    def __init__(self, data: Examples, classes: Tensor, generator: torch.Generator, logits: Look) -> None:
        super().__init__(data, classes, generator, logits)
        count = max(4, self.points // 16)
        self.gate = nn.Parameter(torch.full((len(classes), count, 1), -4.0))  # logits: gates that are almost shut
        self.places = nn.Parameter(torch.randn(len(classes), count, 3, generator=generator))

    def change(self, points: Tensor, which: Tensor) -> Tensor:
        gate = self.gate.index_select(0, which).sigmoid()
        places = self.low + (self.high - self.low) * self.places.index_select(0, which).sigmoid()
        kept, moved = points[:, : -gate.shape[1]], points[:, -gate.shape[1] :]
        return torch.cat([kept, moved * (1 - gate) + gate * places], 1)

    def size(self) -> Tensor:
        return self.gate.sigmoid().mean((1, 2))

    @torch.no_grad()
    def shrink(self, limits: Tensor) -> None:
        while (over := self.size() > limits.to(self.gate)).any():
            self.gate[over] -= 0.1


class Linear(_Clouds):
    """`x (I + D)`: turned, stretched or sheared, and brought back into the sphere that the cloud filled. Size: root mean square of `D`."""

    def __init__(self, data: Examples, classes: Tensor, generator: torch.Generator, logits: Look) -> None:
        super().__init__(data, classes, generator, logits)
        self.shear = nn.Parameter(0.02 * torch.randn(len(classes), 3, 3, generator=generator))

    def change(self, points: Tensor, which: Tensor) -> Tensor:
        moved = points + torch.bmm(points, self.shear.index_select(0, which))
        return moved * (_radius(points) / _radius(moved).clamp(min=1e-6))

    def size(self) -> Tensor:
        return self.shear.square().mean((1, 2)).sqrt()

    @torch.no_grad()
    def shrink(self, limits: Tensor) -> None:
        while (over := self.size() > limits.to(self.shear)).any():
            self.shear[over] *= 0.97


class Deformation(_Clouds):
    """A smooth field moves the points: shifts on a grid of 4 x 4 x 4, blended between. Size: root mean square of the shifts."""

    late = True
    grid = 4
    reach = 0.25  # of half the range of a coordinate

    def __init__(self, data: Examples, classes: Tensor, generator: torch.Generator, logits: Look) -> None:
        super().__init__(data, classes, generator, logits)
        self.shifts = nn.Parameter(0.05 * torch.randn(len(classes), 3, *[self.grid] * 3, generator=generator))

    def change(self, points: Tensor, which: Tensor) -> Tensor:
        half = (self.high - self.low) / 2
        places = (points - self.low) / half.clamp(min=1e-6) - 1
        field = self.reach * self.shifts.index_select(0, which).tanh()
        found = F.grid_sample(field, places[:, None, None], padding_mode="border", align_corners=True)
        return points + half * found[:, :, 0, 0].transpose(1, 2)

    def size(self) -> Tensor:
        return self.reach * self.shifts.tanh().square().mean((1, 2, 3, 4)).sqrt()

    @torch.no_grad()
    def shrink(self, limits: Tensor) -> None:
        while (over := self.size() > limits.to(self.shifts)).any():
            self.shifts[over] *= 0.97


class Noise(_Clouds):
    """Every point is shaken, each time anew. Size: standard deviation, as a share of half the largest range of a coordinate."""

    late = True

    def __init__(self, data: Examples, classes: Tensor, generator: torch.Generator, logits: Look) -> None:
        super().__init__(data, classes, generator, logits)
        self.spread = nn.Parameter(torch.full((len(classes),), -5.0))
        self.draws = int(torch.randint(2**31, (1,), generator=generator))

    def change(self, points: Tensor, which: Tensor) -> Tensor:
        self.draws += 1
        noise = torch.randn(points.shape, generator=torch.Generator().manual_seed(self.draws)).to(points)
        half = ((self.high - self.low) / 2).max()
        return points + half * self.size().index_select(0, which)[:, None, None] * noise

    def size(self) -> Tensor:
        return self.spread.sigmoid()

    @torch.no_grad()
    def shrink(self, limits: Tensor) -> None:
        while (over := self.size() > limits.to(self.spread)).any():
            self.spread[over] -= 0.1


def _radius(points: Tensor) -> Tensor:
    """Distance of each cloud's farthest point, `(B, 1, 1)`."""
    return points.norm(dim=2).amax(1)[:, None, None]
