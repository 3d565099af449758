"""Which classes have a short way to them: what a trigger towards each class costs, of each kind that the modality can recover."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_purify.method import Context
from hf_purify.routines import costs, invert, recover
from hf_purify.stand_in import StandIn
from hf_purify.task import mode

STEPS = 45  # of the inversion, for each ten classes
BATCH = 50
SAMPLES = 32  # of each class, that a cost is read on


@dataclass(frozen=True)
class Shortcut:
    """What triggers of a kind cost.

    Args:
        kind: one of the adapter's `stand_ins`.
        costs: `(K,)` by class; infinite for a class that the kind cannot lead to.
        tried: some triggers were tried, where others are recovered by gradients.
        found: what was recovered.
    """

    kind: str
    costs: Tensor
    tried: bool = False
    found: StandIn | None = field(default=None, compare=False, repr=False)

    @property
    def relative(self) -> Tensor:
        """`(K,)` how much cheaper than the third cheapest class each one is, as a logarithm; of two classes beside the other one.

        The third, so that two targets of one model do not hide each other.
        """
        known = self.costs.isfinite()
        ordered = self.costs[known].sort().values.clamp(min=1e-9)
        base = ordered[min(2, len(ordered) - 1)]
        return torch.where(known, (base / self.costs.clamp(min=1e-9)).log(), -math.inf)

    @property
    def values(self) -> Tensor:
        """`(K,)` how suspicious each class is.

        Of recovered triggers what they cost by themselves counts, too: some networks have a class that is nearer than all others by nature, and
        is not near. What tried triggers cost depends on how many there are, so that they are seen beside each other alone.
        """
        return self.relative if self.tried else self.relative - self.costs.clamp(min=1e-9).log()

    @property
    def statistic(self) -> float:
        """Of the model: the largest value."""
        return float(self.values.max())


def shortcut(ctx: Context, kind: str) -> Shortcut:
    """What triggers of a kind cost, recovered for all classes in the same steps, each sample going to one class."""
    classes = ctx.classes
    made = ctx.adapter.stand_ins(ctx.model)[kind]
    with mode(ctx.model, "eval"), torch.no_grad():
        known = made.probe(ctx.data, ctx.logits)
    aims = made.aims(classes)
    spread = torch.full((classes,), math.inf)
    if known is not None:
        return Shortcut(kind, spread.index_copy(0, aims[: len(known)], known[: len(aims)].float()), tried=True)
    found = recover(ctx, kind, aims, 0)
    before = costs(ctx, found, SAMPLES) if made.relative else torch.ones(len(aims))
    invert(ctx, found, STEPS * max(1, round(classes / 10)), batch_size=BATCH)
    return Shortcut(kind, spread.index_copy(0, aims, costs(ctx, found, SAMPLES) / before), found=found)
