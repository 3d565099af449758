"""Fine-tuning on the clean samples: the control beside which every repair is shown."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_purify.loop import TrainConfig
from hf_purify.method import Context, Method, MethodConfig, Training, Verdict
from hf_purify.routines import relearn


@dataclass(frozen=True)
class FineTuneConfig(MethodConfig):
    """Settings of fine-tuning.

    Args:
        lr, momentum, weight_decay: of SGD, cosine to zero. None for `lr`: 0.01 with batch norms, 0.003 elsewhere.
        epochs, batch_size: over the clean samples.
    """

    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 5e-4
    epochs: int = 20
    batch_size: int = 128


class FineTune(Method):
    """Train all weights on the clean samples, nothing else; in a sequence, removed neurons stay removed.

    Reference: Liu et al., RAID 2018 (fine-tuning as a baseline), arXiv 1805.12185.
    """

    name = "fine_tune"
    config_class = FineTuneConfig
    config: FineTuneConfig
    trains = True
    control = True

    def plan(self, ctx: Context) -> Training:
        config = self.config
        norms = any(hasattr(m, "running_mean") for m in ctx.model.modules())
        return Training(
            TrainConfig(
                epochs=config.epochs,
                batch_size=config.batch_size,
                lr=config.lr if config.lr is not None else 0.01 if norms else 0.003,
                momentum=config.momentum,
                weight_decay=config.weight_decay,
                schedule="cosine",
                clip=5.0,
            )
        )

    def purify(self, ctx: Context) -> Verdict:
        train = self.plan(ctx).train
        relearn(ctx, train, index=ctx.index, removed=ctx.removed, title="fine-tune")
        return Verdict(torch.zeros(len(ctx.index)), torch.ones(len(ctx.index)), notes={"learning rate": train.lr})
