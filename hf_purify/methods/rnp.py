"""RNP: reconstructive neuron pruning."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_purify.errors import ConfigError
from hf_purify.loop import TrainConfig
from hf_purify.method import Context, Method, MethodConfig, Verdict
from hf_purify.neurons import NeuronIndex
from hf_purify.routines import forgetting_level, tune_mask, unlearn


@dataclass(frozen=True)
class RNPConfig(MethodConfig):
    """Settings of RNP.

    Args:
        unlearn_lr: first rate of the ascent, which then controls itself. None chooses 0.01 with batch norms, 0.001 elsewhere.
        unlearn_steps: bound on its steps.
        recover_epochs, recover_lr, alpha: mask recovery; `alpha` scales the loss, the rate is `alpha * recover_lr`.
        batch_size: of both.
        max_loss: clean accuracy, 0..1, that pruning may cost on held-out samples.
        granularity: role of the neurons, or `auto`.
    """

    unlearn_lr: float | None = None
    unlearn_steps: int = 400
    recover_epochs: int = 20
    recover_lr: float = 0.2
    alpha: float = 0.2
    batch_size: int = 128
    max_loss: float = 0.02
    granularity: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.max_loss <= 1:
            raise ConfigError(f"max_loss must be in [0, 1], got {self.max_loss}")


class RNP(Method):
    """Unlearn the clean task, recover it with a mask, prune the original (Li et al., ICML 2023, arXiv 2305.14876).

    1. Ascend the clean loss over all weights until the clean task is forgotten; the backdoor survives.
    2. Freeze these weights and learn a mask in [0, 1] that brings the clean task back.
    3. In the original network prune the neurons that the clean task did not want back: those with `mask <= tau`.

    Changed on purpose. The threshold: the released code prints test accuracy and test ASR for each tau and a person picks
    (the BackdoorBench port takes the tau of lowest test ASR); here it is the largest tau whose accuracy on held-out clean
    samples drops by at most `max_loss`. The ascent: gradients are clipped after they exist (the released order clips
    nothing), the rate adapts, the stop is read on held-out samples, and a run that never forgets is an outcome that is
    reported, where the released code loads the file of an earlier run. Statistics: batch norms keep the original's.
    """

    name = "rnp"
    config_class = RNPConfig
    config: RNPConfig
    begins = "the suspected neurons, whose mask begins at one half"

    def purify(self, ctx: Context) -> Verdict:
        config = self.config
        index = ctx.neurons(config.granularity)
        norms = all(g.role == "norm" for g in index)
        with ctx.copy():
            forgotten = unlearn(
                ctx,
                ctx.reading,
                ctx.classes,
                lr=config.unlearn_lr if config.unlearn_lr is not None else 0.01 if norms else 1e-3,
                max_steps=config.unlearn_steps,
                config=TrainConfig(steps=1, batch_size=config.batch_size),
            )
            recover = TrainConfig(
                epochs=config.recover_epochs,
                batch_size=config.batch_size,
                lr=config.alpha * config.recover_lr if norms else 0.05,
                optimizer="sgd" if norms else "adamw",
                mode="train" if norms else "eval",
            )
            mask = tune_mask(ctx, index, recover, start=self._start(ctx, index), title="recover").cpu()
        kept = ctx.index.embed(index, mask)
        curve = sweep(ctx, kept)
        chosen = choose(curve, config.max_loss)
        notes = {
            "unlearning steps": forgotten.steps,
            "unlearning rate": forgotten.lr,
            "accuracy after unlearning": forgotten.accuracy,
            "forgotten": forgotten.accuracy <= forgetting_level(ctx.classes),
            "largest class after unlearning": f"{forgotten.majority_class} ({100 * forgotten.majority:.0f} %)",
        }
        if chosen is None:
            return Verdict(
                1 - kept, torch.ones(len(ctx.index)), notes=notes | {"threshold": "none: every pruning cost too much"}, curve=tuple(curve)
            )
        pruned = (kept <= chosen["threshold"]) & (kept < 1)
        notes |= {"threshold": chosen["threshold"], "removed": int(pruned.sum())}
        return Verdict(1 - kept, (~pruned).float(), notes=notes, curve=tuple(curve))

    def _start(self, ctx: Context, index: NeuronIndex) -> Tensor | None:
        """A mask that begins low for the neurons that a scan suspects, so that they come back only where the clean task wants them."""
        if ctx.finding is None:
            return None
        parts = ctx.index.split(ctx.finding.neurons)
        return 1 - 0.5 * torch.cat([parts[g.name] for g in index]).float()


def sweep(ctx: Context, kept: Tensor) -> list[dict[str, float]]:
    """Held-out clean accuracy of the original network at each threshold 0, 0.05, ..., 0.9 that removes more than the one before."""
    curve: list[dict[str, float]] = [{"threshold": -0.05, "removed": 0, "held_out_accuracy": ctx.accuracy(), "cut": 2.0}]
    for k in range(19):
        tau = round(0.05 * k, 2)
        pruned = (kept <= tau) & (kept < 1)
        if int(pruned.sum()) == curve[-1]["removed"]:
            continue
        accuracy = ctx.accuracy((~pruned).float())
        curve.append({"threshold": tau, "removed": int(pruned.sum()), "held_out_accuracy": accuracy, "cut": 1 - tau - 1e-9})
        if accuracy < 1.5 / ctx.classes:
            break
    return curve


def choose(curve: list[dict[str, float]], max_loss: float) -> dict[str, float] | None:
    """The largest threshold whose held-out accuracy lies within `max_loss` of the unpruned network's."""
    fine = [p for p in curve[1:] if p["held_out_accuracy"] >= curve[0]["held_out_accuracy"] - max_loss]
    return fine[-1] if fine else None
