"""Triggers recovered from a model and clean samples alone: what leads samples of other classes to each one's class, and is small (Wang et al., IEEE S&P 2019)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_purify.adapter import Batch
from hf_purify.loop import TrainConfig, train
from hf_purify.stand_in import StandIn
from hf_purify.task import Task, fetch, mode

SPARSITY = 20.0  # weight of a recovered trigger's size beside the loss that it reaches


def invert(task: Task, stand_in: StandIn, steps: int, *, batch_size: int = 100, lr: float = 0.2) -> None:
    """Recover triggers: what, put on clean samples of other classes, makes the model see each one's class, and is small.

    All of them share each step, a sample going to one drawn at random, so that a step costs one forward and backward pass
    whatever their number. The model is left alone.
    """

    def objective(batch: Batch) -> Tensor:
        which = torch.randint(len(stand_in.classes), (len(batch["labels"]),), generator=task.generator).to(task.device)
        losses, others = _losses(task, stand_in, batch, which)
        return losses.sum() / others.sum().clamp(min=1) + SPARSITY * stand_in.size().mean()

    _invert(task, stand_in, objective, steps, min(batch_size, task.adapter.at_once), lr)


def compare(task: Task, stand_in: StandIn, steps: int, first: int, kept: int, *, batch_size: int, samples: int, lr: float = 0.2) -> Tensor:
    """Recover triggers so that they can be compared: all see the same samples in the same order, and none takes part in another's steps.

    Args:
        first: steps for all of them; the rest are for the cheapest.
        kept: how many these are.
        batch_size: samples a step, each of which goes to every trigger.
        samples: that costs are read on.

    Returns:
        What each costs, `(S,)`, on the same samples; of those that were left behind, when they were.
    """
    found = torch.empty(len(stand_in.classes))
    going = torch.arange(len(stand_in.classes))

    def objective(batch: Batch) -> Tensor:
        count, size = len(going), len(batch["labels"])
        repeated = {name: values.repeat_interleave(count, 0) for name, values in batch.items()}
        losses, others = _losses(task, stand_in, repeated, going.repeat(size).to(task.device))
        by_trigger = losses.view(size, count).sum(0) / others.view(size, count).sum(0).clamp(min=1)
        return (by_trigger + SPARSITY * stand_in.size()[going]).sum()

    def narrow(step: int) -> None:
        nonlocal going
        if step == first:  # read even if all go on: other triggers, that are compared with these, must see the same samples afterwards
            found[going] = costs(task, stand_in, samples, same=going)
            going = found.argsort(stable=True)[:kept].sort().values

    _invert(task, stand_in, objective, steps, max(1, min(batch_size, task.adapter.at_once // len(going))), lr, narrow)
    found[going] = costs(task, stand_in, samples, same=going)
    return found


def _invert(
    task: Task,
    stand_in: StandIn,
    objective: Callable[[Batch], Tensor],
    steps: int,
    batch_size: int,
    lr: float,
    after_step: Callable[[int], None] | None = None,
) -> None:
    config = TrainConfig(steps=steps, batch_size=batch_size, replacement=True, optimizer="adamw", lr=lr, momentum=0.5, mode="eval")
    train(
        task,
        stand_in.parameters(),
        config,
        objective=objective,
        after_step=after_step,
        changed=list(stand_in.buffers()),
        title="recover triggers",
    )


def glance(task: Task, kind: str) -> Tensor | None:
    """What triggers of a kind cost by class, `(K,)`, where the kind tells without an inversion."""
    with mode(task.model, "eval"), torch.no_grad():
        return task.adapter.stand_ins(task.model)[kind].look(task.data, task.logits)


def recover(task: Task, kind: str, classes: Tensor, steps: int) -> StandIn:
    """Triggers recovered for `classes` `(S,)` from the model as it is; a class may be there more than once, from different starts.

    Args:
        kind: one of the adapter's `stand_ins`.
        steps: of the inversion; 0 leaves them as built.
    """
    with mode(task.model, "eval"), torch.no_grad():
        made = task.adapter.stand_ins(task.model)[kind](task.data, classes, task.generator, task.logits)
    stand_in = made.to(task.device)
    if steps:
        invert(task, stand_in, steps)
    return stand_in


@torch.no_grad()
def copied(task: Task, kind: str, rows: Sequence[tuple[StandIn, int, int]]) -> StandIn:
    """Triggers that are copies of others of their kind.

    Args:
        rows: of each, where it is taken from, its position there, and the class that it is to lead to.
    """
    made = recover(task, kind, torch.tensor([k for _, _, k in rows]), 0)
    for row, (source, position, _) in enumerate(rows):
        for ours, theirs in zip(made.parameters(), source.parameters(), strict=True):
            ours[row] = theirs[position]
    return made


@torch.no_grad()
def costs(task: Task, stand_in: StandIn, samples: int = 64, same: Tensor | None = None) -> Tensor:
    """What inversion left of its objective, `(S,)`: the loss on up to `samples` clean samples of other classes, and the size.

    Args:
        same: positions of triggers to be read alone, on the same samples; without them each is read on samples of its own.
    """
    rows = torch.arange(len(stand_in.classes)) if same is None else same
    draws = [torch.randperm(len(task.data), generator=task.generator)[:samples] for _ in (rows if same is None else range(1))]
    chosen = torch.cat(draws if same is None else draws * len(rows))
    which = rows.repeat_interleave(len(chosen) // max(1, len(rows)))
    total, seen = (torch.zeros(len(stand_in.classes), device=task.device) for _ in range(2))
    with mode(task.model, "eval"):
        for indices, some in zip(*(v.split(task.adapter.at_once) for v in (chosen, which.to(task.device))), strict=True):
            losses, others = _losses(task, stand_in, fetch(task, indices), some)
            total.index_add_(0, some, losses)
            seen.index_add_(0, some, others)
    return (total / seen.clamp(min=1) + SPARSITY * stand_in.size())[rows.to(task.device)].cpu()


def _losses(task: Task, stand_in: StandIn, batch: Batch, which: Tensor) -> tuple[Tensor, Tensor]:
    """Loss towards the class of trigger `which[i]` on sample `i`, and 1 for samples of other classes, `(B,)` each; 0 for the rest."""
    wanted = stand_in.classes[which]
    others = (wanted != batch["labels"]).float()
    return task.loss({**stand_in.place(batch, which), "labels": wanted}).float() * others, others
