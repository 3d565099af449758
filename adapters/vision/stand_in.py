"""Recovered image triggers: a mask and a pattern for each, as in Neural Cleanse (Wang et al., IEEE S&P 2019)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_purify.adapter import Batch, Examples, StandIn


class Patches(StandIn):
    """`(1 - m) x + m p`: for each class a mask `m` in [0, 1] over the pixels and a pattern `p` in the range of the inputs."""

    low: Tensor
    high: Tensor

    def __init__(self, data: Examples, classes: Tensor, generator: torch.Generator) -> None:
        images = data.batch(torch.arange(min(len(data), 512)))["pixel_values"].float()
        super().__init__(classes)
        self.register_buffer("low", images.amin((0, 2, 3), keepdim=True))
        self.register_buffer("high", images.amax((0, 2, 3), keepdim=True))
        _, channels, height, width = images.shape
        self.mask = nn.Parameter(torch.full((len(classes), 1, height, width), -4.0))  # logits: a mask of almost nothing
        self.pattern = nn.Parameter(torch.randn(len(classes), channels, height, width, generator=generator))

    def place(self, batch: Batch, which: Tensor) -> Batch:
        images, which = batch["pixel_values"], which.to(self.mask.device)
        mask = self.mask[which].sigmoid()
        pattern = self.low + (self.high - self.low) * self.pattern[which].sigmoid()
        return {**batch, "pixel_values": (images * (1 - mask) + mask * pattern).to(images)}

    def size(self) -> Tensor:
        return self.mask.sigmoid().mean((1, 2, 3))

    @torch.no_grad()
    def shrink(self, limits: Tensor) -> None:
        while (over := self.size() > limits.to(self.mask)).any():
            self.mask[over] -= 0.1
