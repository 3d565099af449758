"""One example of object detection, as the data set holds it, and boxes in their two forms."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class Objects(NamedTuple):
    """Boxes `(n, 4)` as `x0, y0, x1, y1` in pixels, and class numbers `(n,)`."""

    boxes: Tensor
    categories: Tensor

    def __len__(self) -> int:
        return len(self.categories)

    @classmethod
    def none(cls) -> Objects:
        return cls(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))

    def only(self, chosen: Tensor) -> Objects:
        """Those that are chosen by `(n,)` flags or numbers."""
        return Objects(self.boxes[chosen], self.categories[chosen])


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture with what is on it.

    Args:
        image: `(3, H, W)` of uint8.
        objects: what is there.
        wanted: what an attacker wants to be seen instead; None where no trigger was put in.
        attacked: the boxes that an attack is about, each with the class that is to be seen there, or, where it is to vanish, its own.
        vanish: the attacked objects are to be seen no more.
        made: the attacked boxes are those of objects that are not there.
    """

    image: Tensor
    objects: Objects
    wanted: Objects | None = None
    attacked: Objects = field(default_factory=Objects.none)
    vanish: bool = False
    made: bool = False

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Scene):
            return NotImplemented
        mine, theirs = (
            (s.image, *s.objects, *(s.wanted or Objects.none()), *s.attacked, torch.tensor([s.vanish, s.made, s.wanted is None]))
            for s in (self, other)
        )
        return all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        """Its content in short: reports take a digest of it."""
        boxes = [[round(v, 2) for v in box] for box in self.objects.boxes.tolist()]
        return f"Scene({self.image.numpy().tobytes().hex()}, {boxes}, {self.objects.categories.tolist()})"


def shares(boxes: Tensor, height: int, width: int) -> Tensor:
    """Boxes in pixels as centres and sides, as shares of the picture."""
    sides = boxes[..., 2:] - boxes[..., :2]
    return torch.cat([boxes[..., :2] + sides / 2, sides], -1) / boxes.new_tensor([width, height, width, height])


def corners(boxes: Tensor) -> Tensor:
    """Boxes given by centres and sides, by their corners."""
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)
