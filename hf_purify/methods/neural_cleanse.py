"""Neural Cleanse: recover a trigger for each class, unlearn those that are too small."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_purify.errors import ConfigError
from hf_purify.loop import TrainConfig
from hf_purify.method import Context, Method, MethodConfig, Verdict
from hf_purify.routines import invert, recover, relearn


@dataclass(frozen=True)
class NeuralCleanseConfig(MethodConfig):
    """Settings of Neural Cleanse.

    Args:
        find_steps: inversion steps for each ten classes and each copy, to see which class has too small a trigger.
        cut: a class is suspicious if its trigger is smaller than this share of the next smallest, in (0, 1]; 1 takes the smallest always.
        copies: triggers recovered for a class, from different starts.
        invert_steps: inversion steps for them, before the unlearning.
        share: part of each batch that is repeated with a recovered trigger on it and its true label, in (0, 1].
        distill: weight of the divergence from the original model's predictions on clean samples.
        max_loss: clean accuracy, 0..1, that the repair may cost on held-out samples; a rate that costs more is halved, at most three times.
        lr, momentum, weight_decay, steps, batch_size: of SGD, cosine to zero. Steps, since a repair with one sample a class needs as many.
    """

    find_steps: int = 40
    cut: float = 0.8
    copies: int = 4
    invert_steps: int = 120
    share: float = 0.5
    distill: float = 3.0
    max_loss: float = 0.1
    lr: float = 0.003
    momentum: float = 0.9
    weight_decay: float = 5e-4
    steps: int = 70
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
    """Unlearn the triggers that can be recovered from the model itself (Wang et al., IEEE S&P 2019, doi 10.1109/SP.2019.00031).

    1. Recover for each class a small mask and pattern that turn clean samples of other classes into it. A backdoor
       makes one far smaller than the rest. A model in which no class stands out is left as it is.
    2. Recover several for the class that does, and fine-tune with them on some of the samples, under the true labels.

    Chosen on held-out clean samples: the learning rate, halved while it costs too much clean accuracy.

    Changed on purpose. All classes are recovered in the same steps, each sample going to one class, at a tenth of the cost of one
    after the other. Masks are judged early, when a backdoor's shortcut shows most, and beside the next smallest: with ten
    classes the MAD index was 1.9 on a clean network and 2.0 on a backdoored one. Each step of unlearning is followed by one of inversion
    on the model as it is by then, no larger than at first; else a single pattern is unlearned and the backdoor behind it is
    not (the inner loop of I-BAU, Zeng et al., ICLR 2022, arXiv 2110.03735). `distill * KL(original || current)` on clean samples holds on to
    clean accuracy. Wang et al. unlearn one pattern for one epoch.
    """

    name = "neural_cleanse"
    config_class = NeuralCleanseConfig
    config: NeuralCleanseConfig

    def purify(self, ctx: Context) -> Verdict:
        notes, suspicious = self._look(ctx)
        if suspicious is not None:
            notes |= self._unlearn(ctx, suspicious)
        return Verdict(torch.zeros(len(ctx.index)), torch.ones(len(ctx.index)), notes=notes)

    def _look(self, ctx: Context) -> tuple[dict[str, Any], int | None]:
        """Recover triggers for each class and compare their mean sizes; what was seen, and the suspicious class."""
        copies, classes = self.config.copies, ctx.classes
        steps = self.config.find_steps * copies * math.ceil(classes / 10)
        sizes = recover(ctx, torch.arange(classes).repeat(copies), steps).size().detach().cpu().view(copies, classes).mean(0)
        (smallest, second), (k, _) = (v.tolist() for v in sizes.topk(2, largest=False))
        share = smallest / second
        suspicious = k if share < self.config.cut or self.config.cut == 1 else None
        notes = {
            "suspicious class": "none: the model was left as it is" if suspicious is None else str(k),
            "smallest trigger": f"class {k}, {100 * smallest:.1f} % of an input (next {100 * second:.1f} %, median {100 * float(sizes.median()):.1f} %)",
            "share of the next": round(share, 3),
        }
        return notes, suspicious

    def _unlearn(self, ctx: Context, suspicious: int) -> dict[str, Any]:
        """Fine-tune against triggers recovered for the class, at the largest rate that held-out accuracy bears."""
        config, least = self.config, ctx.accuracy() - self.config.max_loss
        stand_in = recover(ctx, torch.full((config.copies,), suspicious), config.invert_steps)
        limits = stand_in.size().detach()
        start = {k: v.detach().clone() for k, v in ctx.model.state_dict().items()}
        teacher = ctx.teacher()

        def objective(batch: dict[str, Tensor]) -> Tensor:
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

        def follow(_: int) -> None:
            invert(ctx, stand_in, 1, batch_size=config.batch_size)
            stand_in.shrink(limits)

        lr = config.lr
        while True:
            train = TrainConfig(
                steps=config.steps,
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
