"""NFT: neural mask fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_purify.errors import ConfigError
from hf_purify.loop import TrainConfig
from hf_purify.method import Context, Method, MethodConfig, Training, Verdict
from hf_purify.neurons import NeuronIndex
from hf_purify.routines import tune_mask


@dataclass(frozen=True)
class NFTConfig(MethodConfig):
    """Settings of NFT; the defaults are those of the released code.

    Args:
        steps: SGD steps on the masks.
        batch_size: drawn with replacement.
        lr, lr_end, momentum: cosine from `lr` to `lr_end` in five periods. None chooses by the network: 0.05 to 0.02 for batch
            norm channels, a fifth of it for hidden units.
        eta: strength of the pull towards 1; divided by the number of samples per class.
        floor: `alpha`, and `decay`: `beta` of the depth-dependent floor `mu(l) = alpha exp(-beta l)`. None for `decay` takes 0.5 per
            masked layer with batch norms, and `4.4 / blocks` per block elsewhere, so that the last block's floor is near 0.01.
        norms: `train` re-estimates batch statistics while masks are tuned, `eval` leaves them alone.
        granularity: role of the neurons, or `auto`.
        level: `activation` or `weight`; see `masks.masked`.
    """

    steps: int = 1000
    batch_size: int = 128
    lr: float | None = None
    lr_end: float | None = None
    momentum: float = 0.95
    eta: float = 1e-3
    floor: float = 0.8
    decay: float | None = None
    norms: str = "train"
    granularity: str = "auto"
    level: str = "activation"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.floor <= 1:
            raise ConfigError(f"floor must be in [0, 1], got {self.floor}")
        if self.norms not in ("train", "eval"):
            raise ConfigError(f"norms must be 'train' or 'eval', got '{self.norms}'")


class NFT(Method):
    """Learn one bounded scalar per neuron on MixUp of a few clean samples (Karim et al., ECCV 2024, arXiv 2407.10052).

    Minimises `MixUp-CE(f(x; m), y) + eta / N_c * sum_l |1 - m_l|_1` over the masks alone, which are clipped to
    `[mu(l), 1]` after each step. Weights stay frozen; the mask is folded into the scales of the norms (their shifts are
    left alone) or into the next layer's columns.

    Changed on purpose: the released script cannot run (counters used before they are set) and seeds only one of three
    generators; here a run is repeatable. It evaluates on the test set while it trains; here nothing is. On networks
    without batch norm the neurons are hidden units and attention values, the model is in eval mode, and the floor
    counts blocks.
    """

    name = "nft"
    config_class = NFTConfig
    config: NFTConfig

    def plan(self, ctx: Context) -> Training:
        config = self.config
        index = ctx.neurons(config.granularity)
        norms = _norms(index)
        lr = config.lr if config.lr is not None else 0.05 if norms else 0.01
        train = TrainConfig(
            steps=config.steps,
            batch_size=config.batch_size,
            replacement=True,
            lr=lr,
            lr_end=config.lr_end if config.lr_end is not None else 0.4 * lr,
            momentum=config.momentum,
            schedule="cosine",
            schedule_every=max(1, config.steps // 5),
            mixup=True,
            mode="train" if norms and config.norms == "train" else "eval",
        )
        return Training(train, index, config.level)

    def purify(self, ctx: Context) -> Verdict:
        config, training = self.config, self.plan(ctx)
        index = training.mask or ctx.index
        floor = floors(index, config, _norms(index))
        per_class = max(1.0, len(ctx.data) / max(1, len(ctx.data.labels.unique())))

        def pull(mask: Tensor) -> Tensor:
            return config.eta / per_class * (1 - mask).abs().sum()

        mask = tune_mask(ctx, index, training.train, floor=floor, penalty=pull, level=training.level, title="NFT").cpu()
        whole = ctx.index.embed(index, mask)
        notes = {"learning rate": training.train.lr, "smallest mask": float(mask.min()), "masks under 0.5": int((mask < 0.5).sum())}
        return Verdict(scores=1 - whole, mask=whole, notes=notes)


def _norms(index: NeuronIndex) -> bool:
    return all(g.role == "norm" for g in index)


def floors(index: NeuronIndex, config: NFTConfig, norms: bool) -> Tensor:
    """The lower bound of each mask, `(N,)`: `alpha exp(-beta l)`, `l` counted from the input."""
    if norms:
        depth = torch.arange(1, len(index.groups) + 1, dtype=torch.float32)
    else:
        blocks = sorted({g.block for g in index})
        depth = torch.tensor([blocks.index(g.block) + 1.0 for g in index])
    decay = config.decay if config.decay is not None else 0.5 if norms else 4.4 / float(depth.max())
    return index.per_group(config.floor * torch.exp(-decay * depth))
