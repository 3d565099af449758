"""Recovered triggers of detectors: a patch at one place of the picture, one on each object, and one that is an object itself.

What each leads to is a class for all objects, or, with the number of classes, that they vanish; see `outputs.aimed_losses`. That they vanish is
looked for on objects alone: what covers the whole picture, or lies anywhere on it, hides objects in any detector.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_iou

from hf_purify.adapter import Batch, Examples

from .._stand_ins import Look, OnInputs, rows
from ..vision import stand_in as pictures
from .scene import corners

TRIES = 16  # places for a patch, of which the emptiest is taken


class _Patch(OnInputs):
    """A square of an eighth of the smaller side: `(1 - m) x + m p` with a mask `m` in [0, 1] and a pattern `p`. Size: a hundredth of the mean of the mask."""

    key = "pixel_values"
    channels = -3
    knob = "gate"
    relative = True
    cells = 8
    part = 8  # of the smaller side of the picture

    def __init__(self, data: Examples, classes: Tensor, generator: torch.Generator, logits: Look) -> None:
        super().__init__(data, classes, generator, logits)
        self.side = max(4, min(self.shape[1:]) // self.part)
        shape = (len(classes), 1, self.cells, self.cells)
        self.gate = nn.Parameter(0.1 * torch.randn(shape, generator=generator))
        self.pattern = nn.Parameter(torch.randn(len(classes), self.shape[0], self.cells, self.cells, generator=generator))
        self.begin_draws(generator)

    def size(self) -> Tensor:
        return 0.01 * self.gate.sigmoid().mean((1, 2, 3))

    def pasted(self, images: Tensor, which: Tensor, image: list[int], middles: Tensor) -> Tensor:
        """Images `(B, C, H, W)` with patch `which[i]` wherever it belongs.

        Args:
            image: which image each place is in.
            middles: of the places `(n, 2)`, as shares across and down.
        """
        mask = F.interpolate(rows(self.gate, which).sigmoid(), (self.side, self.side))
        pattern = F.interpolate(self.low + (self.high - self.low) * rows(self.pattern, which).sigmoid(), (self.side, self.side))
        height, width = images.shape[2:]
        out = images.clone()
        for i, (x, y) in zip(image, middles.tolist(), strict=True):
            top = min(max(0, round(y * height - self.side / 2)), height - self.side)
            left = min(max(0, round(x * width - self.side / 2)), width - self.side)
            part = (i, slice(None), slice(top, top + self.side), slice(left, left + self.side))
            out[part] = images[part] * (1 - mask[i]) + mask[i] * pattern[i]
        return out

    def change(self, items: Tensor, which: Tensor) -> Tensor:
        return items

    def noise(self, *shape: int) -> Tensor:
        """Numbers in [0, 1], others each time."""
        return torch.rand(*shape, generator=self.next_draw())


class OnObjects(_Patch):
    """The patch lies somewhere on each object."""

    def place(self, batch: Batch, which: Tensor) -> Batch:
        image, number = (batch["categories"] >= 0).nonzero(as_tuple=True)
        boxes = batch["boxes"][image, number].cpu()
        middles = boxes[:, :2] + (self.noise(len(boxes), 2) - 0.5) * boxes[:, 2:]
        images = self.pasted(batch["pixel_values"].float(), which.to(self.low.device), image.tolist(), middles)
        return {**batch, "pixel_values": images.to(batch["pixel_values"])}


class _NoVanishing(OnInputs):
    """Leads to classes alone."""

    @classmethod
    def aims(cls, classes: int) -> Tensor:
        return torch.arange(classes - 1)


class AsObject(_NoVanishing, _Patch):
    """The patch lies anywhere, best where no object is, and one is seen there."""

    late = True
    part = 16

    def place(self, batch: Batch, which: Tensor) -> Batch:
        images = batch["pixel_values"].float()
        height, width = images.shape[2:]
        extent = torch.tensor([2 * self.side / width, 2 * self.side / height])
        tried = 0.1 + 0.8 * self.noise(len(images), TRIES, 2)
        boxes = torch.cat([tried, extent.expand_as(tried)], 2)
        objects = torch.where(batch["categories"][..., None] >= 0, batch["boxes"], 0.0).cpu()
        covered = torch.stack([box_iou(corners(b), corners(o)).sum(1) for b, o in zip(boxes, objects, strict=True)])
        sought = boxes[torch.arange(len(images)), covered.argmin(1)]
        middles, sought = sought[:, :2], sought.to(images.device)
        found = self.pasted(images, which.to(self.low.device), list(range(len(images))), middles)
        return {**batch, "pixel_values": found.to(batch["pixel_values"]), "sought": sought}


class Anywhere(_NoVanishing, pictures.Patches):
    """A patch of any form at one place of the picture."""

    relative = True


class Blend(_NoVanishing, pictures.Spectrum):
    """A pattern over the whole picture."""

    relative = True
