"""Removing neurons at random: the control for methods that remove chosen ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_purify.errors import ConfigError
from hf_purify.method import Context, Method, MethodConfig, Verdict


@dataclass(frozen=True)
class RandomMaskConfig(MethodConfig):
    """Settings of the random mask.

    Args:
        removed: number of neurons to remove; None takes `share` of them.
        share: in [0, 1].
        granularity: role of the neurons, or `auto`.
    """

    removed: int | None = None
    share: float = 0.01
    granularity: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.share <= 1:
            raise ConfigError(f"share must be in [0, 1], got {self.share}")


class RandomMask(Method):
    """Remove neurons drawn at random, as many as the method that it is compared with.

    Reference: none; a control.
    """

    name = "random_mask"
    config_class = RandomMaskConfig
    config: RandomMaskConfig
    control = True

    def purify(self, ctx: Context) -> Verdict:
        index = ctx.neurons(self.config.granularity)
        count = self.config.removed if self.config.removed is not None else round(self.config.share * len(index))
        mask = torch.ones(len(index))
        mask[torch.randperm(len(index), generator=ctx.generator)[: min(count, len(index))]] = 0
        return Verdict(torch.zeros(len(ctx.index)), ctx.index.embed(index, mask), notes={"removed": int((mask == 0).sum())})
