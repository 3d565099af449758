"""Recovered video triggers: those of images, put on every frame; a patch of its own in each frame; a light that changes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_purify.adapter import Batch, Examples, StandIn

Look = Callable[[Batch], Tensor]


class _Clips(StandIn):
    """Knows shape and range of the inputs: `shape` is `(T, C, H, W)`, `low` and `high` are `(1, 1, C, 1, 1)`."""

    low: Tensor
    high: Tensor

    def __init__(self, data: Examples, classes: Tensor, generator: torch.Generator, logits: Look) -> None:
        super().__init__(data, classes, generator, logits)
        clips = data.batch(torch.arange(min(len(data), 128)))["pixel_values"].float()
        self.shape = tuple(clips.shape[1:])
        self.register_buffer("low", clips.amin((0, 1, 3, 4), keepdim=True))
        self.register_buffer("high", clips.amax((0, 1, 3, 4), keepdim=True))

    def place(self, batch: Batch, which: Tensor) -> Batch:
        clips = batch["pixel_values"]
        return {**batch, "pixel_values": self.change(clips.float(), which.to(self.low.device)).to(clips)}

    def change(self, clips: Tensor, which: Tensor) -> Tensor:
        """Clips `(B, T, C, H, W)` with trigger `which[i]` on clip `i`."""
        raise NotImplementedError


class MovingPatches(_Clips):
    """`(1 - m) x + m p` with a mask `m` of its own in each frame, on a grid of 16 x 16 at most, and one colour `p`. Size: mean of the mask."""

    late = True
    grid = 16

    def __init__(self, data: Examples, classes: Tensor, generator: torch.Generator, logits: Look) -> None:
        super().__init__(data, classes, generator, logits)
        frames, channels, height, width = self.shape
        cells = (min(self.grid, height), min(self.grid, width))
        self.gate = nn.Parameter(torch.full((len(classes), frames, *cells), -4.0))  # logits: gates that are almost shut
        self.colour = nn.Parameter(torch.randn(len(classes), 1, channels, 1, 1, generator=generator))

    def change(self, clips: Tensor, which: Tensor) -> Tensor:
        mask = F.interpolate(self.gate.index_select(0, which).sigmoid(), clips.shape[-2:])[:, :, None]
        colour = self.low + (self.high - self.low) * self.colour.index_select(0, which).sigmoid()
        return clips * (1 - mask) + mask * colour

    def size(self) -> Tensor:
        return self.gate.sigmoid().mean((1, 2, 3))

    @torch.no_grad()
    def shrink(self, limits: Tensor) -> None:
        while (over := self.size() > limits.to(self.gate)).any():
            self.gate[over] -= 0.1


class Light(_Clips):
    """`clip(x + d[t])`: each frame is brighter or darker, by up to a quarter of the range. Size: root mean square of the shares.

    Looked for late: a backdoor of a patch has some of its effect with a light alone.
    """

    late = True
    amplitude = 0.25

    def __init__(self, data: Examples, classes: Tensor, generator: torch.Generator, logits: Look) -> None:
        super().__init__(data, classes, generator, logits)
        self.shifts = nn.Parameter(0.02 * torch.randn(len(classes), self.shape[0], 1, 1, 1, generator=generator))

    def change(self, clips: Tensor, which: Tensor) -> Tensor:
        shifts = self.amplitude * self.shifts.index_select(0, which).tanh()
        return (clips + (self.high - self.low) * shifts).maximum(self.low).minimum(self.high)

    def size(self) -> Tensor:
        return self.amplitude * self.shifts.tanh().square().mean((1, 2, 3, 4)).sqrt()

    @torch.no_grad()
    def shrink(self, limits: Tensor) -> None:
        while (over := self.size() > limits.to(self.shifts)).any():
            self.shifts[over] *= 0.97
