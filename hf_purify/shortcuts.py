"""Which classes have a short way to them: what a trigger towards each class costs, of each kind that the modality can recover."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_purify.inversion import compare, copied, recover
from hf_purify.method import Context
from hf_purify.stand_in import StandIn
from hf_purify.task import mode

STEPS = 45  # of the inversion
FIRST, KEPT = 25, 5  # after so many steps, only so many of the cheapest classes go on: a cost is seen beside the third, and some fall late
BATCH = 5  # samples a step, each of which goes to every class
SAMPLES = 32  # that a cost is read on
TOGETHER = 10  # classes that are searched at once


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
    """What triggers of a kind cost.

    Those of all classes begin alike and see the same samples in the same order, so that they differ by the class alone.
    """
    made, seed = ctx.adapter.stand_ins(ctx.model)[kind], ctx.generator.initial_seed()
    with mode(ctx.model, "eval"), torch.no_grad():
        known = made.probe(ctx.data, ctx.logits)
    aims = made.aims(ctx.classes)
    found = torch.full((ctx.classes,), math.inf)
    if known is not None:
        return Shortcut(kind, found.index_copy(0, aims[: len(known)], known[: len(aims)].float()), tried=True)
    start = recover(ctx, kind, aims[:1], 0)
    best: list[tuple[StandIn, int, int]] = []
    for group in aims.split(TOGETHER):
        triggers = copied(ctx, kind, [(start, 0, int(k)) for k in group])
        ctx.generator.manual_seed(seed)
        found[group] = compare(ctx, triggers, STEPS, FIRST, KEPT, batch_size=BATCH, samples=SAMPLES)
        rows = sorted([*best, *((triggers, i, int(k)) for i, k in enumerate(group))], key=lambda row: float(found[row[2]]))[:KEPT]
        kept = copied(ctx, kind, rows)
        best = [(kept, i, k) for i, (_, _, k) in enumerate(rows)]
    return Shortcut(kind, found, found=best[0][0])
