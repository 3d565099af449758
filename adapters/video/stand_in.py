"""Recovered video triggers: those of images, put on every frame; a patch of its own in each frame; a light that changes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_purify.adapter import Examples

from .._stand_ins import Look, OnInputs, rows


class _Clips(OnInputs):
    """Inputs are clips `(B, T, C, H, W)`."""

    key = "pixel_values"
    channels = -3


class MovingPatches(_Clips):
    """`(1 - m) x + m p` with a mask `m` of its own in each frame, on a grid of 16 x 16 at most, and one colour `p`. Size: mean of the mask."""

    late = True
    knob = "gate"
    grid = 16

    def __init__(self, data: Examples, classes: Tensor, generator: torch.Generator, logits: Look) -> None:
        super().__init__(data, classes, generator, logits)
        frames, channels, height, width = self.shape
        cells = (min(self.grid, height), min(self.grid, width))
        self.gate = nn.Parameter(torch.full((len(classes), frames, *cells), -4.0))  # logits: gates that are almost shut
        self.colour = nn.Parameter(torch.randn(len(classes), 1, channels, 1, 1, generator=generator))

    def change(self, clips: Tensor, which: Tensor) -> Tensor:
        mask = F.interpolate(rows(self.gate, which).sigmoid(), clips.shape[-2:])[:, :, None]
        colour = self.low + (self.high - self.low) * rows(self.colour, which).sigmoid()
        return clips * (1 - mask) + mask * colour

    def size(self) -> Tensor:
        return self.gate.sigmoid().mean((1, 2, 3))


class Light(_Clips):
    """`clip(x + d[t])`: each frame is brighter or darker, by up to a quarter of the range. Size: root mean square of the shares.

    Looked for late: a backdoor of a patch has some of its effect with a light alone.
    """

    late = True
    knob = "shifts"
    scaled = True
    amplitude = 0.25

    def __init__(self, data: Examples, classes: Tensor, generator: torch.Generator, logits: Look) -> None:
        super().__init__(data, classes, generator, logits)
        self.shifts = nn.Parameter(0.02 * torch.randn(len(classes), self.shape[0], 1, 1, 1, generator=generator))

    def change(self, clips: Tensor, which: Tensor) -> Tensor:
        shifts = self.amplitude * rows(self.shifts, which).tanh()
        return (clips + (self.high - self.low) * shifts).maximum(self.low).minimum(self.high)

    def size(self) -> Tensor:
        return self.amplitude * self.shifts.tanh().square().mean((1, 2, 3, 4)).sqrt()
