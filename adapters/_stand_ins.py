"""What recovered triggers share that change one tensor of inputs. Shared by the modalities."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from hf_purify.adapter import Batch, Examples
from hf_purify.stand_in import StandIn

Look = Callable[[Batch], Tensor]


class OnInputs(StandIn):
    """Knows the inputs: `shape` is that of one, `low` and `high` hold the range of each channel, with a 1 for every other axis.

    A subclass names the parameter that makes its triggers smaller: one that is `scaled`, or one of logits, which are lowered.
    """

    key: ClassVar[str]  # of the inputs in a batch
    channels: ClassVar[int]  # their axis of channels, from behind
    knob: ClassVar[str] = ""
    scaled: ClassVar[bool] = False
    low: Tensor
    high: Tensor

    def __init__(self, data: Examples, classes: Tensor, generator: torch.Generator, logits: Look) -> None:
        super().__init__(data, classes, generator, logits)
        inputs = self.items(data.batch(torch.arange(min(len(data), 512)))[self.key].float())
        others = [axis for axis in range(inputs.dim()) if axis != inputs.dim() + self.channels]
        self.shape = tuple(inputs.shape[1:])
        self.register_buffer("low", inputs.amin(others, keepdim=True))
        self.register_buffer("high", inputs.amax(others, keepdim=True))

    def items(self, inputs: Tensor) -> Tensor:
        """What is changed of the inputs of a batch, item by item: such as all frames of all clips."""
        return inputs

    def place(self, batch: Batch, which: Tensor) -> Batch:
        inputs = batch[self.key]
        items = self.items(inputs)
        which = which.to(self.low.device).repeat_interleave(len(items) // len(inputs))
        return {**batch, self.key: self.change(items.float(), which).to(items).view_as(inputs)}

    @abstractmethod
    def change(self, items: Tensor, which: Tensor) -> Tensor:
        """Items `(B, *shape)` with trigger `which[i]` on item `i`."""

    @torch.no_grad()
    def shrink(self, limits: Tensor) -> None:
        knob = getattr(self, self.knob)
        while (over := self.size() > limits.to(knob)).any():
            knob[over] = 0.97 * knob[over] if self.scaled else knob[over] - 0.1


def rows(values: Tensor, which: Tensor) -> Tensor:
    """`values[which]`, whose gradient several threads would add up in any order."""
    return values.index_select(0, which)
