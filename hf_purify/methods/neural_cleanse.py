"""Neural Cleanse: recover a trigger for each class, unlearn those that are too small."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_purify.adapter import Batch, StandIn
from hf_purify.errors import ConfigError
from hf_purify.loop import TrainConfig
from hf_purify.method import Context, Method, MethodConfig, Verdict
from hf_purify.routines import invert, relearn


@dataclass(frozen=True)
class NeuralCleanseConfig(MethodConfig):
    """Settings of Neural Cleanse.

    Args:
        find_steps: inversion steps for each ten classes, to see which class has too small a trigger.
        cut: a class is suspicious if its trigger is smaller than this share of the median class's, in (0, 1]; 1 takes the smallest always.
        copies: triggers recovered for each suspicious class, from different starts.
        invert_steps: inversion steps for them, before the unlearning.
        share: part of each batch that is repeated with a recovered trigger on it and its true label, in (0, 1].
        distill: weight of the divergence from the original model's predictions on clean samples.
        max_loss: clean accuracy, 0..1, that the repair may cost on held-out samples; a rate that costs more is halved, at most three times.
        lr, momentum, weight_decay, epochs, batch_size: of SGD, cosine to zero.
    """

    find_steps: int = 60
    cut: float = 0.7
    copies: int = 4
    invert_steps: int = 120
    share: float = 0.5
    distill: float = 3.0
    max_loss: float = 0.1
    lr: float = 0.003
    momentum: float = 0.9
    weight_decay: float = 5e-4
    epochs: int = 10
    batch_size: int = 64

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigError(f"share must be in (0, 1], got {self.share}")
        if not 0 <= self.max_loss <= 1:
            raise ConfigError(f"max_loss must be in [0, 1], got {self.max_loss}")
        if not 0 < self.cut <= 1:
            raise ConfigError(f"cut must be in (0, 1], got {self.cut}")
        if min(self.find_steps, self.copies, self.invert_steps) < 1:
            raise ConfigError("find_steps, copies and invert_steps must be at least 1")


class NeuralCleanse(Method):
    """Unlearn the triggers that can be recovered from the model itself (Wang et al., IEEE S&P 2019).

    1. Recover for each class a small mask and pattern that turn clean samples of other classes into it. A backdoor
       makes one far smaller than the rest. A model in which no class stands out is left as it is.
    2. Recover several for each class that does, and fine-tune with them on some of the samples, under the true labels.

    Chosen on held-out clean samples: the learning rate, halved while it costs too much clean accuracy.

    Changed on purpose: all classes are recovered in the same steps, each sample going to one class, at a tenth of the
    cost of one after the other; masks are judged early, when a backdoor's shortcut shows most; each step is followed
    by one of inversion on the model as it is by then, no larger than at first, or else a single pattern is unlearned and the backdoor behind it
    is not (the inner loop of I-BAU, Zeng et al., ICLR 2022); and `distill * KL(original || current)` on clean samples
    holds on to clean accuracy. Wang et al. unlearn one pattern for one epoch.
    """

    name = "neural_cleanse"
    config_class = NeuralCleanseConfig
    config: NeuralCleanseConfig

    def purify(self, ctx: Context) -> Verdict:
        notes, suspicious = self._look(ctx)
        if len(suspicious):
            notes |= self._unlearn(ctx, suspicious)
        return Verdict(torch.zeros(len(ctx.index)), torch.ones(len(ctx.index)), notes=notes)

    def _look(self, ctx: Context) -> tuple[dict[str, Any], Tensor]:
        """Recover two triggers for each class, from different starts, and judge their mean size; what was seen, and the suspicious classes."""
        steps = 2 * self.config.find_steps * math.ceil(ctx.classes / 10)
        found = recovered(ctx, torch.arange(ctx.classes).repeat(2), steps)
        sizes = found.size().detach().cpu().view(2, ctx.classes).mean(0)
        smallest, shares = int(sizes.argmin()), sizes / sizes.median()
        order = shares.argsort()[: max(1, ctx.classes // 4)]
        suspicious = order[shares[order] < self.config.cut] if self.config.cut < 1 else order[:1]
        notes = {
            "suspicious classes": ", ".join(str(int(c)) for c in suspicious) or "none: the model was left as it is",
            "smallest trigger": f"class {smallest}, {100 * float(sizes[smallest]):.1f} % of an input (median {100 * float(sizes.median()):.1f} %)",
            "share of the median": round(float(shares[smallest]), 3),
        }
        return notes, suspicious

    def _unlearn(self, ctx: Context, classes: Tensor) -> dict[str, Any]:
        """Fine-tune against triggers recovered for `classes`, at the largest rate that held-out accuracy bears."""
        config, least = self.config, ctx.accuracy() - self.config.max_loss
        stand_in = recovered(ctx, classes.repeat_interleave(config.copies), config.invert_steps)
        limits = stand_in.size().detach()
        start = {k: v.detach().clone() for k, v in ctx.model.state_dict().items()}
        objective = self._objective(ctx, stand_in)

        def follow(_: int) -> None:
            invert(ctx, stand_in, 1, batch_size=config.batch_size)
            stand_in.shrink(limits)

        lr = config.lr
        while True:
            train = TrainConfig(
                epochs=config.epochs,
                batch_size=config.batch_size,
                lr=lr,
                momentum=config.momentum,
                weight_decay=config.weight_decay,
                schedule="cosine",
            )
            relearn(
                ctx, train, index=ctx.index, removed=ctx.removed, objective=objective, after_step=follow, title="unlearn recovered triggers"
            )
            reached = ctx.accuracy()
            if reached >= least - 1e-6 or lr <= config.lr / 8:
                return {"lr": lr, "held-out accuracy": reached, "within max_loss": reached >= least - 1e-6}
            lr /= 2
            ctx.model.load_state_dict(start)

    def _objective(self, ctx: Context, stand_in: StandIn) -> Any:
        config, teacher = self.config, ctx.teacher()

        def objective(batch: Batch) -> Tensor:
            n = len(batch["labels"])
            some = {k: v[: max(1, round(config.share * n))] for k, v in batch.items()}
            which = torch.randint(len(stand_in.classes), (len(some["labels"]),), generator=ctx.generator).to(ctx.device)
            with torch.no_grad():
                hit = stand_in.place(some, which)
                expected = ctx.adapter.logits(teacher, batch).float().softmax(-1)
            both = {k: torch.cat([v, hit[k]]) for k, v in batch.items()}
            logits = ctx.adapter.logits(ctx.model, both).float()
            clean = F.cross_entropy(logits[:n], batch["labels"])
            kept = F.kl_div(logits[:n].log_softmax(-1), expected, reduction="batchmean")
            return clean + config.distill * kept + F.cross_entropy(logits[n:], some["labels"])

        return objective


def recovered(ctx: Context, classes: Tensor, steps: int) -> StandIn:
    """Triggers recovered for `classes` `(S,)` from the model as it is."""
    stand_in = ctx.adapter.stand_in(ctx.data, classes, ctx.generator).to(ctx.device)
    invert(ctx, stand_in, steps)
    return stand_in
