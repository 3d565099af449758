"""Which neurons carry a backdoor: several signals, each a score for every neuron, and how far they agree.

None needs the attacker's trigger. Where it is known, the trigger-activated change is the truth that they are judged by.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import combinations

import torch
from scipy import stats
from torch import Tensor

from hf_purify.activations import activation_change
from hf_purify.forgetting import Forgotten
from hf_purify.loop import TrainConfig
from hf_purify.method import Context
from hf_purify.neurons import NeuronIndex
from hf_purify.routines import tune_mask
from hf_purify.salience import benign_salience, lipschitz, weight_change
from hf_purify.stand_in import StandIn
from hf_purify.task import fetch, mode, put_back

CUT = 3.0  # standard deviations above its layer's mean, from which a neuron is suspected
MOST = 0.1  # of a layer's neurons
SAMPLES = 100
RECOVER_STEPS, BATCH = 10, 50
ACTIVATION, CHANGE, SALIENCE, MASK, LIPSCHITZ = (
    "trigger activation",
    "weight change",
    "benign salience",
    "recovered mask",
    "Lipschitz bound",
)


def neuron_signals(ctx: Context, index: NeuronIndex, forgotten: Forgotten, found: StandIn | None) -> dict[str, Tensor]:
    """Scores `(N,)` over `index`, each standardized within its layer, higher = more suspicious.

    Args:
        forgotten: the unlearned model.
        found: recovered triggers of the suspected classes; without them there is no `trigger activation`.
    """
    scores: dict[str, Tensor] = {}
    if found is not None:
        which = torch.arange(SAMPLES) % len(found.classes)
        scores[ACTIVATION] = change_by(ctx, index, lambda batch: found.place(batch, which[: len(batch["labels"])].to(ctx.device)))
    scores[CHANGE] = weight_change(index, forgotten.original, forgotten.state)
    with mode(ctx.model, "eval"):
        batches = (fetch(ctx, rows) for rows in torch.arange(min(len(ctx.data), 4 * SAMPLES)).split(SAMPLES))
        scores[SALIENCE] = -benign_salience(ctx.model, index, ctx.loss, batches)
    scores[LIPSCHITZ] = lipschitz(ctx.model, index)
    scores[MASK] = 1 - _recovered(ctx, index, forgotten)
    return {name: index.standardize(score.float().cpu()) for name, score in scores.items()}


def change_by(ctx: Context, index: NeuronIndex, place: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Tensor:
    """How far what `place` puts on clean samples moves each neuron's activation, `(N,)`."""
    rows = torch.arange(min(len(ctx.data), SAMPLES))
    batch = fetch(ctx, rows)
    with mode(ctx.model, "eval"), torch.no_grad():
        return activation_change(
            ctx.model, index, lambda: ctx.adapter.logits(ctx.model, batch), lambda: ctx.adapter.logits(ctx.model, place(batch))
        )


def _recovered(ctx: Context, index: NeuronIndex, forgotten: Forgotten) -> Tensor:
    """The mask under which the unlearned model does its task again, after a few steps: RNP's, shortened."""
    norms = all(g.role == "norm" for g in index)
    train = TrainConfig(
        steps=RECOVER_STEPS,
        batch_size=BATCH,
        lr=0.1 if norms else 0.05,
        optimizer="sgd" if norms else "adamw",
        mode="frozen_norm" if norms else "eval",
    )
    put_back(ctx.model, forgotten.state)
    try:
        return tune_mask(ctx, index, train, title="recover").cpu()
    finally:
        put_back(ctx.model, forgotten.original)


def suspected(index: NeuronIndex, scores: Tensor) -> Tensor:
    """Which neurons `(N,)` are suspected: those far above their layer's mean, at most a tenth of a layer."""
    flags = []
    for part in index.standardize(scores).split(index.sizes):
        flag = torch.zeros(len(part), dtype=torch.bool)
        best = part.argsort(descending=True)[: max(1, math.floor(MOST * len(part)))]
        flag[best[part[best] > CUT]] = True
        flags.append(flag)
    return torch.cat(flags) if flags else torch.zeros(0, dtype=torch.bool)


def agreement(scores: Mapping[str, Tensor]) -> dict[str, float]:
    """Rank correlation (Spearman) of each pair of signals; pairs with a constant one are left out."""
    found = {}
    for (a, x), (b, y) in combinations(scores.items(), 2):
        if float(x.std()) > 0 and float(y.std()) > 0:
            found[f"{a} / {b}"] = round(float(stats.spearmanr(x.numpy(), y.numpy()).statistic), 3)
    return found
