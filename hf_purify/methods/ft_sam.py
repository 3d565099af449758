"""FT-SAM: fine-tuning with adaptive sharpness-aware minimisation."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_purify.errors import ConfigError
from hf_purify.loop import TrainConfig
from hf_purify.method import Context, Method, MethodConfig, Verdict
from hf_purify.routines import relearn
from hf_purify.task import put_back, snapshot


@dataclass(frozen=True)
class FTSAMConfig(MethodConfig):
    """Settings of FT-SAM.

    Args:
        rho: radius of the perturbation, to begin with.
        max_loss: clean accuracy, 0..1, that the repair may cost on held-out samples; a radius that costs more is halved and the
            repair begun anew, at most three times. Networks differ widely in the radius they bear. 1 keeps the radius.
        distill: weight of the divergence from the original model's predictions on clean samples; 0 is the published loss.
        label_smoothing: of the labels, in [0, 1).
        lr, momentum, weight_decay, epochs, batch_size: of SGD, cosine to zero.
    """

    rho: float = 4.0
    max_loss: float = 0.1
    distill: float = 1.0
    label_smoothing: float = 0.0
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    epochs: int = 30
    batch_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rho <= 0:
            raise ConfigError(f"rho must be positive, got {self.rho}; plain fine-tuning is the method 'fine_tune'")
        if not 0 <= self.max_loss <= 1:
            raise ConfigError(f"max_loss must be in [0, 1], got {self.max_loss}")
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")


class FTSAM(Method):
    """Fine-tune at the sharpest point nearby, which shrinks the weights that a backdoor lives on (Zhu et al., ICCV 2023, arXiv 2304.11823).

    Each step takes the gradient at `w + rho |w|^2 g / || |w| g ||`. Batch statistics of the perturbed pass are not kept.

    Chosen on held-out clean samples: the radius, halved while it costs too much clean accuracy.

    Added: `distill * KL(original || current)` on the same clean images. The original model is right on clean samples; holding
    on to its soft predictions wins back accuracy that 500 labels alone cannot, and allows a larger radius. In a sequence,
    neurons that an earlier method removed stay removed.
    """

    name = "ft_sam"
    config_class = FTSAMConfig
    config: FTSAMConfig
    trains = True

    def purify(self, ctx: Context) -> Verdict:
        config, teacher = self.config, ctx.teacher() if self.config.distill else None

        seen: list[Any] = [None, None]

        def objective(batch: dict[str, Tensor]) -> Tensor:
            logits, losses = ctx.both(batch)
            said = logits.float().log_softmax(-1)
            loss = losses.mean()
            if config.label_smoothing:
                loss = (1 - config.label_smoothing) * loss - config.label_smoothing * said.mean()
            if teacher is None:
                return loss
            if seen[0] is not batch:  # both passes of a step see the same batch
                with torch.no_grad():
                    seen[:] = batch, ctx.logits(batch, teacher).float().softmax(-1)
            return loss + config.distill * F.kl_div(said, seen[1], reduction="batchmean")

        train = TrainConfig(
            epochs=config.epochs,
            batch_size=config.batch_size,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            schedule="cosine",
        )
        start = snapshot(ctx.model)
        least = max(ctx.accuracy(), _accuracy_of(ctx, ctx.original)) - config.max_loss
        rho = config.rho
        while True:
            relearn(ctx, train, index=ctx.index, removed=ctx.removed, objective=objective, sharpness=rho, title=f"FT-SAM, radius {rho:g}")
            reached = ctx.accuracy()
            if reached >= least - 1e-6 or rho <= config.rho / 8:
                break
            rho /= 2
            put_back(ctx.model, start)
        notes = {"rho": rho, "held-out accuracy": reached, "within max_loss": reached >= least - 1e-6}
        return Verdict(torch.zeros(len(ctx.index)), torch.ones(len(ctx.index)), notes=notes)


def _accuracy_of(ctx: Context, model: torch.nn.Module | None) -> float:
    """Held-out accuracy of the original model, in a sequence; 0 where there is none."""
    return 0.0 if model is None else dataclasses.replace(ctx, model=model).accuracy()
