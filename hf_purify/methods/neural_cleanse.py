"""Neural Cleanse: recover triggers for each class, unlearn those that are too cheap."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_purify.errors import ConfigError
from hf_purify.inversion import costs, glance, invert, recover
from hf_purify.loop import TrainConfig
from hf_purify.method import Context, Method, MethodConfig, Verdict
from hf_purify.routines import relearn, unlearn
from hf_purify.task import put_back, reading, snapshot


@dataclass(frozen=True)
class NeuralCleanseConfig(MethodConfig):
    """Settings of Neural Cleanse.

    Args:
        find_steps: inversion steps for each ten classes and each copy, to see which class has too small a trigger.
        cut: a class is suspicious if its triggers cost less than this share of the next class's, in (0, 1]; two are if they cost less than
            the square of it beside the third; 1 takes the cheapest always.
        errors: a class is suspicious, too, if it has the cheapest trigger of some kind and this part of the errors while the clean task is
            unlearned, in (0, 1].
        unlearn_lr: first rate of that unlearning, which then controls itself.
        copies: triggers recovered for a class, from different starts.
        invert_steps: inversion steps for them, before the unlearning.
        follow: inversion steps after each step of it.
        share: part of each batch that is repeated with a recovered trigger on it and its true label, in (0, 1].
        distill: weight of the divergence from the original model's predictions on clean samples.
        max_loss: clean accuracy, 0..1, that the repair may cost on held-out samples; a rate that costs more is halved, at most three times.
        lr, momentum, weight_decay, steps, batch_size: of SGD in networks with batch norms and no attention, of AdamW elsewhere, cosine to zero; a
            rate of None is 0.002 for SGD, 0.001 for attention on a backbone with batch norms, and 0.0005. Steps, since a repair with one sample a class needs as many.
    """

    find_steps: int = 40
    cut: float = 0.7
    errors: float = 0.9
    unlearn_lr: float = 0.003
    copies: int = 4
    invert_steps: int = 120
    follow: int = 3
    share: float = 0.5
    distill: float = 3.0
    max_loss: float = 0.2
    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 5e-4
    steps: int = 70
    batch_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise ConfigError(f"share must be in (0, 1], got {self.share}")
        if not 0 <= self.max_loss <= 1:
            raise ConfigError(f"max_loss must be in [0, 1], got {self.max_loss}")
        if not 0 < self.cut <= 1 or not 0 < self.errors <= 1:
            raise ConfigError(f"cut and errors must be in (0, 1], got {self.cut} and {self.errors}")
        if min(self.copies, self.follow) < 1:
            raise ConfigError(f"copies and follow must be at least 1, got {self.copies} and {self.follow}")


class Seen(NamedTuple):
    """The two classes with the cheapest triggers of a kind, of how many; what the first costs beside the second, and that beside the third."""

    first: int
    second: int
    one: float
    two: float
    classes: int

    def __str__(self) -> str:
        return f"class {self.first} at {self.one:.2f} of {self.second}, that at {self.two:.2f} of the next"


def _seen(costs: Tensor) -> Seen:
    """The two cheapest classes."""
    found = costs.sort()
    (first, second), cost = found.indices[:2].tolist(), found.values.tolist()
    return Seen(first, second, cost[0] / cost[1], cost[1] / cost[2] if len(cost) > 3 else 1.0, len(cost))


class NeuralCleanse(Method):
    """Unlearn the triggers that can be recovered from the model itself (Wang et al., IEEE S&P 2019, doi 10.1109/SP.2019.00031).

    1. Recover for each class triggers that turn clean samples of other classes into it, of each kind that the modality knows. A
       backdoor makes those of one class far cheaper than the rest; some networks have another class that is as cheap by nature.
    2. If none is, unlearn the clean task a little, on a copy: with a backdoor nearly all samples fall to its class.
       A model in which no class stands out either way is left as it is.
    3. Recover several triggers for the class that does, or for both, and fine-tune with them on some of the samples, under the true labels.

    Chosen on held-out clean samples: the learning rate, halved while it costs too much clean accuracy.

    Changed on purpose. Wang et al. know patches; a patch is no short way to the class of a blended picture, a sine wave or a warp. All
    classes are recovered in the same steps, each sample going to one class, at a tenth of the cost of one after the other. They are
    judged early, when a backdoor's shortcut shows most, by loss and size together, and beside the next cheapest: with ten classes
    the MAD index was 1.9 on a clean network and 2.0 on a backdoored one. That an unlearned model falls to the backdoor's class was seen by Li et al.
    (RNP, ICML 2023). Each step of fine-tuning is followed by some of inversion
    on the model as it is by then, no larger than at first; else a single pattern is unlearned and the backdoor behind it is
    not (the inner loop of I-BAU, Zeng et al., ICLR 2022, arXiv 2110.03735). `distill * KL(original || current)` on clean samples holds on to
    clean accuracy. Wang et al. unlearn one pattern for one epoch.
    """

    name = "neural_cleanse"
    config_class = NeuralCleanseConfig
    config: NeuralCleanseConfig
    trains = True
    begins = "the suspected classes and the kind of their triggers, in the place of its own search"

    def purify(self, ctx: Context) -> Verdict:
        if ctx.finding is not None and ctx.finding.targets:
            found: tuple[list[int], str] | None = (list(ctx.finding.targets), ctx.finding.kind)
            notes: dict[str, Any] = {"suspicious class": " and ".join(map(str, ctx.finding.targets)), "found by": "the scan"}
        else:
            found, notes = self._look(ctx)
        if found is not None:
            notes |= self._unlearn(ctx, *found)
        return Verdict(torch.zeros(len(ctx.index)), torch.ones(len(ctx.index)), notes=notes)

    def _look(self, ctx: Context) -> tuple[tuple[list[int], str] | None, dict[str, Any]]:
        """The suspicious classes with the kind of their triggers, or None, and what was seen."""
        kinds: dict[str, Seen] = {}
        made = ctx.adapter.stand_ins(ctx.model)
        for late in (False, True):
            kinds |= {kind: self._cheapest(ctx, kind) for kind in made if made[kind].late is late}
            notes = {"cheapest triggers": "; ".join(f"{kind}: {seen}" for kind, seen in kinds.items())}
            best = min(kinds, key=lambda kind: kinds[kind].one)
            if kinds[best].one < self.config.cut or self.config.cut == 1:
                return ([kinds[best].first], best), {"suspicious class": str(kinds[best].first), "found by": best} | notes
            best = min(kinds, key=lambda kind: kinds[kind].two)
            if kinds[best].two < self.config.cut**2:
                pair = [kinds[best].first, kinds[best].second]
                return (pair, best), {"suspicious class": " and ".join(map(str, pair)), "found by": best} | notes
        relative = any(kind.relative for kind in made.values())  # what is forgotten falls to nothing then, or to one of two, anyway
        if relative or max(seen.classes for seen in kinds.values()) == 2:
            return None, {"suspicious class": "none: the model was left as it is"} | notes
        fallback, part = self._fallback(ctx)
        notes["after unlearning"] = f"{100 * part:.0f} % of the errors are class {fallback}"
        if part >= self.config.errors and fallback in (seen.first for seen in kinds.values()):
            return ([fallback], next(iter(kinds))), {"suspicious class": str(fallback), "found by": "unlearning"} | notes
        return None, {"suspicious class": "none: the model was left as it is"} | notes

    def _cheapest(self, ctx: Context, kind: str) -> Seen:
        copies, classes = self.config.copies, ctx.classes
        known = glance(ctx, kind)
        if known is not None:
            return _seen(known)
        steps = self.config.find_steps * copies * math.ceil(classes / 10)
        made = ctx.adapter.stand_ins(ctx.model)[kind]
        every = made.aims(classes).repeat(copies)
        found = costs(ctx, recover(ctx, kind, every, steps)).view(copies, -1).mean(0)
        if made.relative:
            found = found / costs(ctx, recover(ctx, kind, every, 0)).view(copies, -1).mean(0)
        return _seen(found)

    def _fallback(self, ctx: Context, runs: int = 2) -> tuple[int, float]:
        """The class that samples fall to while the clean task is unlearned, and its part of the errors."""
        errors = torch.zeros(ctx.classes)
        start = ctx.accuracy()
        for _ in range(runs):
            with ctx.copy():
                unlearn(ctx, ctx.reading, ctx.classes, lr=self.config.unlearn_lr, level=0.7 * start, gain=0.02)
                found, right, _ = reading(ctx, ctx.data)
            wrong = torch.bincount(found[found != right], minlength=ctx.classes).float()
            errors += wrong / wrong.sum().clamp(min=1) / runs
        return int(errors.argmax()), float(errors.max())

    def _unlearn(self, ctx: Context, suspicious: list[int], kind: str) -> dict[str, Any]:
        """Fine-tune against triggers of a kind recovered for the classes, at the largest rate that held-out accuracy bears."""
        config, least = self.config, ctx.accuracy() - self.config.max_loss
        recovered = recover(ctx, kind, torch.tensor(suspicious).repeat(config.copies), config.invert_steps)
        limits = recovered.size().detach()
        notes = {"recovered": said} if (said := recovered.describe()) else {}
        start = snapshot(ctx.model)
        teacher = ctx.teacher()

        def objective(batch: dict[str, Tensor]) -> Tensor:
            n = len(batch["labels"])
            some = {k: v[: max(1, round(config.share * n))] for k, v in batch.items()}
            which = torch.randint(len(stand_in.classes), (len(some["labels"]),), generator=ctx.generator).to(ctx.device)
            with torch.no_grad():
                hit = stand_in.place(some, which)
                expected = ctx.logits(batch, teacher).float().softmax(-1)
            if hit.keys() == batch.keys():
                said, losses = ctx.both({k: torch.cat([v, hit[k]]) for k, v in batch.items()})
                said, (clean, fooled) = said[: len(expected)], losses.split([n, len(some["labels"])])
            else:
                said, clean = ctx.both(batch)
                fooled = ctx.loss(hit)
            kept = F.kl_div(said.float().log_softmax(-1), expected, reduction="batchmean")
            return clean.mean() + config.distill * kept + fooled.mean()

        def follow(_: int) -> None:
            invert(ctx, stand_in, config.follow, batch_size=config.batch_size)
            stand_in.shrink(limits)

        batch_norms = all(g.role == "norm" for g in ctx.neurons())
        # Attention learns under AdamW alone; batch norms beside it bear less than without it. .001 was chosen on one small RT-DETR.
        plain = batch_norms and not len(ctx.index.where(role="attention"))
        first = lr = config.lr or (0.002 if plain else 0.001 if batch_norms else 5e-4)
        while True:
            stand_in = copy.deepcopy(recovered)
            train = TrainConfig(
                steps=config.steps,
                batch_size=config.batch_size,
                lr=lr,
                momentum=config.momentum,
                weight_decay=config.weight_decay,
                schedule="cosine",
                optimizer="sgd" if plain else "adamw",
            )
            relearn(
                ctx,
                train,
                index=ctx.index,
                removed=ctx.removed,
                objective=objective,
                after_step=follow,
                changed=[*stand_in.parameters(), *stand_in.buffers()],
                title="unlearn recovered triggers",
            )
            reached = ctx.accuracy()
            if reached >= least - 1e-6 or lr <= first / 8:
                return {**notes, "lr": lr, "held-out accuracy": reached, "within max_loss": reached >= least - 1e-6}
            lr /= 2
            put_back(ctx.model, start)
