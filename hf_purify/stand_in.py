"""What a modality says about triggers that nobody knows: kinds that can be recovered from clean samples, each a `StandIn` of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from hf_purify.adapter import Batch, Examples


class StandIn(nn.Module, ABC):
    """Recovered triggers, each leading to a class: what a defender can make of clean samples alone. Its parameters are theirs.

    A subclass is one kind of trigger; as built, before any inversion, it changes next to nothing.

    Args:
        data: clean samples, which give the shape and the range of an input.
        classes: `(S,)` the class that each one leads to; a class may be there more than once.
        generator: of the first values.
        logits: what the model says of a batch, `(B, classes)`: for a look at where to begin.
    """

    relative: ClassVar[bool] = False  # a class costs what inversion leaves of the cost before it: some are nearer by nature
    late: ClassVar[bool] = False  # looked for only where no other kind leads to one class alone
    classes: Tensor
    draws: Tensor

    def __init__(self, data: Examples, classes: Tensor, generator: torch.Generator, logits: Callable[[Batch], Tensor]) -> None:
        super().__init__()
        self.register_buffer("classes", classes)

    def begin_draws(self, generator: torch.Generator) -> None:
        """For kinds that are placed at random: the seed is a buffer, so that checkpoints keep it."""
        self.register_buffer("draws", torch.randint(2**31, (1,), generator=generator))

    def next_draw(self) -> torch.Generator:
        """A generator for one placing, another each time."""
        self.draws += 1
        return torch.Generator().manual_seed(int(self.draws))

    @classmethod
    def aims(cls, classes: int) -> Tensor:
        """Which of so many classes a trigger of this kind may lead to: the first ones."""
        return torch.arange(classes)

    @classmethod
    def look(cls, data: Examples, logits: Callable[[Batch], Tensor]) -> Tensor | None:
        """What the cheapest trigger of each class costs, `(K,)`, where a look tells; None where triggers must be recovered to know."""
        return None

    @classmethod
    def probe(cls, data: Examples, logits: Callable[[Batch], Tensor]) -> Tensor | None:
        """For a scan: what the cheapest of some triggers that are tried costs by class, `(K,)`; None where triggers must be recovered to know."""
        return cls.look(data, logits)

    def describe(self) -> str:
        """The triggers in words, where words can say it."""
        return ""

    @abstractmethod
    def place(self, batch: Batch, which: Tensor) -> Batch:
        """Put recovered trigger `which[i]` on example `i`, differentiably; labels stay."""

    @abstractmethod
    def size(self) -> Tensor:
        """`(S,)` how much of an example each one changes, from 0 up; comparable within a kind only."""

    @abstractmethod
    def shrink(self, limits: Tensor) -> None:
        """Bring each one's size down to its limit `(S,)`, in place."""
