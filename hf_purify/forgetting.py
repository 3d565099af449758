"""What a model still does when its clean task is unlearned: with a backdoor, samples fall to the attacker's class (Li et al., RNP, ICML 2023)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_purify.loop import TrainConfig
from hf_purify.method import Context
from hf_purify.neurons import get_tensor, owned
from hf_purify.routines import unlearn
from hf_purify.task import put_back, reading, snapshot

LEVEL = 0.7  # of the held-out accuracy that is left
GAIN = 0.02  # a step that raises the loss by less lets the rate grow
BATCH = 64


@dataclass(frozen=True)
class Forgotten:
    """A model after its clean task was partly unlearned.

    Args:
        state: its weights and buffers.
        original: those of the model as it came.
        confusion: `(K, K)` clean samples by true class and by what the unlearned model says.
        accuracy: held-out accuracy that is left.
        steps: of the unlearning.
        rows: `(K,)` how far the classifier's row of each class moved, the neuron weight change of ULRL; None where there is no such row.
    """

    state: dict[str, Tensor]
    original: dict[str, Tensor]
    confusion: Tensor
    accuracy: float
    steps: int
    rows: Tensor | None

    @property
    def shares(self) -> Tensor:
        """`(K,)` share of the errors that fall to each class; zeros where there are none."""
        wrong = self.confusion.clone().fill_diagonal_(0).sum(0)
        return wrong / wrong.sum().clamp(min=1)


def forget(ctx: Context) -> Forgotten:
    """Unlearn the clean task a little, and leave the model as it was."""
    norms = any(hasattr(m, "running_mean") for m in ctx.model.modules())
    lr = 0.01 if norms else 5e-4  # to begin with; it controls itself
    start = ctx.accuracy()
    original = snapshot(ctx.model)
    try:
        level = max(LEVEL * start, 1.2 / ctx.classes)
        done = unlearn(ctx, ctx.reading, ctx.classes, lr=lr, config=TrainConfig(steps=1, batch_size=BATCH), level=level, gain=GAIN)
        said, right, _ = reading(ctx, ctx.data)
        state = snapshot(ctx.model)
        rows = _moved_rows(ctx, original)
    finally:
        put_back(ctx.model, original)
    counts = torch.zeros(ctx.classes, ctx.classes)
    counts.index_put_((right, said), torch.ones(len(said)), accumulate=True)
    return Forgotten(state, original, counts, done.accuracy, done.steps, rows)


def _moved_rows(ctx: Context, original: dict[str, Tensor]) -> Tensor | None:
    """`sum |w_after - w_before|` over each class row of the classifier."""
    heads = ctx.index.where(role="head").groups
    if not heads or heads[-1].size != ctx.classes:
        return None
    group = heads[-1]
    now = get_tensor(ctx.model, group.gate.param).detach().cpu().float()
    return owned(now - original[group.gate.param].float(), group.gate, group.size).abs().flatten(1).sum(1)
