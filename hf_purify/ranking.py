"""Which samples carry a trigger: those whose features in the unlearned model are a recovered trigger's rather than clean samples'."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from scipy import stats
from sklearn.covariance import ledoit_wolf
from torch import Tensor, nn

from hf_purify.adapter import Batch, Examples
from hf_purify.forgetting import Forgotten
from hf_purify.method import Context
from hf_purify.stand_in import StandIn
from hf_purify.task import by_length, mode, put_back

SAMPLES = 200  # clean ones that a recovered trigger is put on
FEW = 8  # clean samples that a recovered trigger must lead to its class, for their features to be learned from
FOLDS = 5
BY_LOGIT = "the unlearned model's logit of a suspected class, less its mean over clean samples of that class, in their standard deviations"
BY_BOTH = (
    f"{BY_LOGIT}; and how much likelier the sample's features there are with the recovered trigger than without it, as a logarithm (linear discriminant), in "
    "standard deviations over clean samples"
)


class Ranker:
    """Scores samples by what the unlearned model says of them, without their labels.

    Clean features are partly gone from the unlearned model and the trigger's are not (Li et al., RNP, ICML 2023). Genuine samples of the attacker's class have a
    large logit there, too; how clean samples look with the recovered trigger on them tells the two apart, where one was recovered that leads clean samples to
    its class.

    Args:
        targets: the suspected classes; where there are none, all are looked at.
        found: triggers recovered for them.
    """

    def __init__(self, ctx: Context, forgotten: Forgotten, targets: Sequence[int], found: StandIn | None = None) -> None:
        self.ctx, self.forgotten, self.targets = ctx, forgotten, targets
        self.clean = self._read(ctx.data)
        self.triggered = self._with(found) if found is not None else {}

    @property
    def about(self) -> str:
        """What the scores are."""
        return BY_BOTH if self.triggered else BY_LOGIT

    def __call__(self, samples: Examples) -> Tensor:
        """Scores `(n,)`, higher = more suspicious."""
        logits, features = self._read(samples)
        scores = torch.full((len(samples),), -math.inf)
        for k in self.targets or range(self.ctx.classes):
            own = self.clean[0][self.ctx.data.labels == k, k]
            base = own if len(own) > 1 else self.clean[0][:, k]
            score = (logits[:, k] - base.mean()) / base.std().clamp_min(1e-6)
            if k in self.triggered:
                odds = log_odds(self.clean[1], self.triggered[k], torch.cat([features, self.clean[1]]))
                score += odds[: len(samples)] / odds[len(samples) :].std().clamp_min(1e-6)
            scores = scores.maximum(score)
        return scores

    def of_clean(self, target: int) -> Tensor:
        """Log odds `(n,)` that the features of all clean samples are those of a recovered trigger; of those that they are learned from, each by what the others show."""
        features, with_it = self.clean[1], self.triggered[target]
        fold, scores = torch.arange(len(features)) % FOLDS, torch.empty(len(features))
        for k in range(FOLDS):
            scores[fold == k] = log_odds(features[fold != k], with_it, features[fold == k])
        return torch.cat([scores, log_odds(features, with_it, self._read(self.ctx.judged)[1])])

    def _with(self, found: StandIn) -> dict[int, Tensor]:
        """By suspected class, the features of clean samples of others which its trigger leads there."""
        ctx, kept = self.ctx, {}
        data = ctx.data.select(torch.randperm(len(ctx.data), generator=torch.Generator().manual_seed(0))[:SAMPLES])
        for position, target in enumerate(self.targets):

            def place(rows: Tensor, position: int = position) -> Batch:
                batch = {k: v.to(ctx.device) for k, v in data.batch(rows).items()}
                return found.place(batch, torch.full((len(rows),), position, device=ctx.device))

            said = _run(ctx, data, place)[0].argmax(-1)
            reached = (said == target) & (data.labels != target)
            if int(reached.sum()) >= FEW:
                kept[target] = self._read(data, place)[1][reached]
        return kept

    def _read(self, samples: Examples, place: Callable[[Tensor], Batch] | None = None) -> tuple[Tensor, Tensor]:
        """Logits and features of samples in the unlearned model."""
        put_back(self.ctx.model, self.forgotten.state)
        try:
            return _run(self.ctx, samples, place)
        finally:
            put_back(self.ctx.model, self.forgotten.original)


def _run(ctx: Context, samples: Examples, place: Callable[[Tensor], Batch] | None = None) -> tuple[Tensor, Tensor]:
    """Logits `(n, K)`, and features `(n, D)`: what the classifier's last layer is given; of a model without such a layer, the logits again."""
    logits: dict[int, Tensor] = {}
    features: dict[int, Tensor] = {}
    with mode(ctx.model, "eval"), torch.no_grad(), ctx.accelerator.autocast(), _at_head(ctx) as seen:
        for rows in by_length(samples, ctx.adapter.at_once):
            seen.clear()
            out = (ctx.logits(place(rows)) if place else ctx.logits(samples.batch(rows))).float().cpu()
            given = seen[-1] if seen and seen[-1].dim() == 2 and len(seen[-1]) == len(rows) else out
            for i, row in enumerate(rows.tolist()):
                logits[row], features[row] = out[i], given[i]
    order = range(len(samples))
    return torch.stack([logits[i] for i in order]), torch.stack([features[i] for i in order])


@contextlib.contextmanager
def _at_head(ctx: Context) -> Iterator[list[Tensor]]:
    """What the layer of the classifier's rows is given, call by call."""
    heads = [g for g in ctx.index.where(role="head").groups if g.size == ctx.classes]
    seen: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs:
            seen.append(inputs[0].detach().flatten(1).float().cpu() if inputs[0].dim() == 4 else inputs[0].detach().float().cpu())

    handle = ctx.model.get_submodule(heads[-1].module).register_forward_pre_hook(keep) if heads else None
    try:
        yield seen
    finally:
        if handle is not None:
            handle.remove()


def log_odds(clean: Tensor, triggered: Tensor, features: Tensor) -> Tensor:
    """How much likelier features `(n, D)` are among the triggered than among the clean ones, as a logarithm `(n,)`.

    A linear discriminant, with the covariance of Ledoit and Wolf (Journal of Multivariate Analysis, 2004).
    """
    clean, triggered = clean.double(), triggered.double()
    center, other = clean.mean(0), triggered.mean(0)
    spread = torch.cat([clean - center, triggered - other])
    scale = spread.std(0)
    scale = scale.clamp_min(float(0.01 * scale.mean()) + 1e-9)  # a feature that hardly moves must not decide alone
    covariance, _ = ledoit_wolf((spread / scale).numpy(), assume_centered=True)
    ridge = 1e-6 * torch.eye(len(scale), dtype=torch.float64)  # features may all be dead
    direction = torch.linalg.solve(torch.from_numpy(covariance) + ridge, (other - center) / scale) / scale
    return ((features.double() - (center + other) / 2) @ direction).float()


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
