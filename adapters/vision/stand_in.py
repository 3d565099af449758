"""Recovered image triggers of four kinds; each finds what the others do not.

A patch is small in pixels, a blended picture or a sine wave in frequencies, a warp in neither.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_purify.adapter import Batch, Examples

from .._stand_ins import Look, OnInputs, rows


class _Pictures(OnInputs):
    """Inputs are images `(B, C, H, W)`, or clips `(B, T, C, H, W)`, of which each frame is changed alike."""

    key = "pixel_values"
    channels = -3

    def items(self, inputs: Tensor) -> Tensor:
        return inputs.flatten(0, -4)


class _Gated(_Pictures):
    """Its size is the mean of a gate in [0, 1]: `gate` holds the logits, `(S, 1, *shape)`."""

    knob = "gate"

    def start(self, *shape: int) -> None:
        self.gate = nn.Parameter(torch.full((len(self.classes), 1, *shape), -4.0))  # logits: a gate that is almost shut

    def size(self) -> Tensor:
        return self.gate.sigmoid().mean((1, 2, 3))


class Patches(_Gated):
    """`(1 - m) x + m p`: a mask `m` in [0, 1] over the pixels and a pattern `p` in the range of the inputs (Wang et al., IEEE S&P 2019).

    Size: mean of the mask.
    """

    def __init__(self, data: Examples, classes: Tensor, generator: torch.Generator, logits: Look) -> None:
        super().__init__(data, classes, generator, logits)
        channels, height, width = self.shape
        self.start(height, width)
        self.pattern = nn.Parameter(torch.randn(len(classes), channels, height, width, generator=generator))

    def change(self, images: Tensor, which: Tensor) -> Tensor:
        mask = rows(self.gate, which).sigmoid()
        pattern = self.low + (self.high - self.low) * rows(self.pattern, which).sigmoid()
        return images * (1 - mask) + mask * pattern


class Spectrum(_Gated):
    """`clip(x + d)`: the spectrum of `d` is a gate in [0, 1] for each frequency times a wave for each channel.

    Waves have an amplitude of up to a quarter of the range of the inputs. Frequencies go up to 16 periods across the image; on larger ones
    the pattern is stretched. Size: mean of the gates.
    """

    periods = 16
    amplitude = 0.25

    def __init__(self, data: Examples, classes: Tensor, generator: torch.Generator, logits: Look) -> None:
        super().__init__(data, classes, generator, logits)
        channels, *sides = self.shape
        self.sides = [min(side, 2 * self.periods) for side in sides]
        shape = (self.sides[0], self.sides[1] // 2 + 1)
        self.start(*shape)
        self.cosines = nn.Parameter(torch.randn(len(classes), channels, *shape, generator=generator))
        self.sines = nn.Parameter(torch.randn(len(classes), channels, *shape, generator=generator))

    def change(self, images: Tensor, which: Tensor) -> Tensor:
        waves = rows(self.gate, which).sigmoid() * torch.complex(rows(self.cosines, which).tanh(), rows(self.sines, which).tanh())
        pattern = self.amplitude * torch.fft.irfft2(waves, s=self.sides, norm="forward")
        if pattern.shape[2:] != images.shape[2:]:
            pattern = F.interpolate(pattern, images.shape[2:], mode="bilinear", align_corners=False)
        return (images + (self.high - self.low) * pattern).maximum(self.low).minimum(self.high)


class Waves(Spectrum):
    """A `Spectrum` of few and weak waves. Large ones are a shortcut in any network, which hides a backdoor that is a single weak one.

    Size: five times the mean, over frequencies, of gate times amplitude (root mean square over channels, as a share of the largest).
    """

    late = True
    highest = 8  # periods along a side of the waves that are tried
    faint = 0.045  # their amplitude, as a share of the range of the inputs
    tried, glanced = 32, 4  # samples, of different classes first, and those that all waves are put on
    best = 3  # waves by class that the rest are put on
    at_once = 64  # images in a pass

    @classmethod
    def probe(cls, data: Examples, logits: Look) -> Tensor:
        """Every plane wave up to 8 periods is put on a few samples of different classes: no gradient leads to a single faint one."""
        turn = torch.empty(len(data), dtype=torch.long)  # which one of its class each sample is
        for c in data.labels.unique():
            turn[data.labels == c] = torch.arange(int((data.labels == c).sum()))
        some = turn.argsort(stable=True)[: cls.tried]
        down, right = torch.meshgrid(*(torch.arange(side) / side for side in data.batch(some)[cls.key].shape[-2:]), indexing="ij")
        waves = [(u, v) for u in range(cls.highest + 1) for v in range(-cls.highest, cls.highest + 1) if u > 0 or v > 0]
        items = data.batch(some)[cls.key].flatten(0, -4)
        spread = cls.faint * (items.amax((0, 2, 3), keepdim=True) - items.amin((0, 2, 3), keepdim=True))
        patterns = [spread * torch.sin(2 * torch.pi * (u * down + v * right)) for u, v in waves]
        first, rest = some[: cls.glanced], some[cls.glanced :]
        seen = cls._with(data.batch(first), patterns, logits)  # (waves, samples, K)
        if not len(rest):
            return -_towards(seen, data.labels[first]).amax(0)
        best = _towards(seen, data.labels[first]).topk(min(cls.best, len(waves)), 0).indices.unique()
        seen = torch.cat([seen[best], cls._with(data.batch(rest), [patterns[i] for i in best], logits)], 1)
        return -_towards(seen, data.labels[some]).amax(0)

    @classmethod
    def _with(cls, batch: Batch, patterns: Sequence[Tensor], logits: Look) -> Tensor:
        """Log probabilities `(P, B, K)` of samples with each pattern on them."""
        images = batch[cls.key]
        items = images.flatten(0, -4)
        low, high = (f((0, 2, 3), keepdim=True) for f in (items.amin, items.amax))
        found = []
        for some in torch.stack(list(patterns)).split(max(1, cls.at_once // len(items))):
            changed = (items + some).maximum(low).minimum(high)  # (patterns, items, C, H, W)
            whole = {name: values.repeat(len(some), *[1] * (values.dim() - 1)) for name, values in batch.items()}
            said = logits({**whole, cls.key: changed.flatten(0, 1).view_as(whole[cls.key])}).float().log_softmax(-1).cpu()
            found.append(said.view(len(some), len(images), -1))
        return torch.cat(found)

    def size(self) -> Tensor:
        waves = torch.stack([self.cosines, self.sines]).tanh().square().sum(0).mean(1, keepdim=True)
        return 5 * (self.gate.sigmoid() * (waves + 1e-12).sqrt()).mean((1, 2, 3))


def _towards(log_p: Tensor, labels: Tensor) -> Tensor:
    """Mean log probability `(P, K)` of each class over samples of others; of a class that all samples are of, nothing speaks."""
    others = (labels[:, None] != torch.arange(log_p.shape[2])).float()  # (samples, K)
    return torch.where(others.sum(0) > 0, (log_p * others).sum(1) / others.sum(0).clamp(min=1), -math.inf)


class Warp(_Pictures):
    """Pixels are taken from places that a smooth field moves, by at most an eighth of a side.

    The field is a grid of 4 x 4 shifts, stretched. Size: root mean square of the shifts, as a share of a side.
    """

    knob = "shifts"
    scaled = True
    grid = 4
    reach = 0.125
    places: Tensor

    def __init__(self, data: Examples, classes: Tensor, generator: torch.Generator, logits: Look) -> None:
        super().__init__(data, classes, generator, logits)
        _, height, width = self.shape
        down, right = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
        self.register_buffer("places", torch.stack([right, down], -1))
        self.shifts = nn.Parameter(0.2 * torch.randn(len(classes), 2, self.grid, self.grid, generator=generator))

    def field(self) -> Tensor:
        """Shifts `(S, 2, H, W)` as shares of a side."""
        # the field is a quarter of its parameters, so that all kinds can be recovered at one rate
        field = F.interpolate(0.25 * self.shifts, self.shape[1:], mode="bicubic", align_corners=True)
        return self.reach * field.tanh()

    def change(self, images: Tensor, which: Tensor) -> Tensor:
        places = self.places + 2 * rows(self.field().permute(0, 2, 3, 1), which)
        return F.grid_sample(images, places.clamp(-1, 1), padding_mode="border", align_corners=True)

    def size(self) -> Tensor:
        return self.field().square().mean((1, 2, 3)).sqrt()
