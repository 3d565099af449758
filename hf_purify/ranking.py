"""Which samples carry a trigger: how far each goes beyond the clean samples of the class that it falls to, in the unlearned model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from scipy import stats
from torch import Tensor

from hf_purify.adapter import Examples
from hf_purify.forgetting import Forgotten
from hf_purify.method import Context
from hf_purify.task import by_length, mode, put_back

ABOUT = "the unlearned model's logit of a suspected class, less its mean over clean samples of that class, in their standard deviations"


def suspicion(ctx: Context, forgotten: Forgotten, samples: Examples, targets: Sequence[int]) -> Tensor:
    """Scores `(n,)` of samples, higher = more suspicious. Their labels are not looked at.

    Clean features are partly gone from the unlearned model and the trigger's are not (Li et al., RNP, ICML 2023). Its confidence says
    little of two samples that are both sure; the logit does, beside those of clean samples of the class.

    Args:
        targets: the suspected classes; where there are none, all are looked at.
    """
    put_back(ctx.model, forgotten.state)
    try:
        clean, found = _logits(ctx, ctx.data), _logits(ctx, samples)
    finally:
        put_back(ctx.model, forgotten.original)
    scores = torch.full((len(samples),), -math.inf)
    for k in targets or range(ctx.classes):
        own = clean[ctx.data.labels == k, k]
        base = own if len(own) > 1 else clean[:, k]
        scores = scores.maximum((found[:, k] - base.mean()) / base.std().clamp_min(1e-6))
    return scores


def _logits(ctx: Context, samples: Examples) -> Tensor:
    """`(n, K)` of all samples, in eval mode."""
    batches = by_length(samples, ctx.adapter.at_once)
    found = torch.empty(len(samples), ctx.classes)
    with mode(ctx.model, "eval"), torch.no_grad(), ctx.accelerator.autocast():
        for rows in batches:
            found[rows] = ctx.logits(samples.batch(rows)).float().cpu()
    return found


def auroc(scores: Tensor, positive: Tensor) -> tuple[float, list[float]]:
    """Area under the ROC curve with its 95 % interval (Hanley and McNeil, Radiology 1982).

    Args:
        positive: `(n,)` of bool; NaN where all are alike.

    >>> auroc(torch.tensor([0.1, 0.4, 0.9, 0.8]), torch.tensor([False, False, True, True]))[0]
    1.0
    """
    hits, misses = int(positive.sum()), int((~positive).sum())
    if not hits or not misses:
        return math.nan, []
    ranks = torch.from_numpy(stats.rankdata(scores.numpy()))
    area = float((ranks[positive].sum() - hits * (hits + 1) / 2) / (hits * misses))
    first, second = area / (2 - area), 2 * area**2 / (1 + area)
    variance = (area * (1 - area) + (hits - 1) * (first - area**2) + (misses - 1) * (second - area**2)) / (hits * misses)
    half = 1.96 * math.sqrt(max(0.0, variance))
    return area, [max(0.0, area - half), min(1.0, area + half)]
