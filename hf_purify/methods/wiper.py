"""WIPER: benign salience and adaptive regularization."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_purify.errors import ConfigError
from hf_purify.loop import TrainConfig
from hf_purify.method import Context, Method, MethodConfig, Verdict
from hf_purify.neurons import NeuronIndex, ParamSlice, get_tensor, owned
from hf_purify.routines import relearn
from hf_purify.salience import benign_salience
from hf_purify.task import fetch, mode


@dataclass(frozen=True)
class WiperConfig(MethodConfig):
    """Settings of WIPER.

    Args:
        select: `lowest` salience is bad (the paper's meaning), `highest` (the released code to the letter).
        eta: memory of the salience.
        alpha: weight of the penalty, shared out over as many weights as the classifier has.
        beta: share of neurons that is bad at the start; grows to `rho_max`.
        rho_max: largest share; 1 in the released code, where the selection vanishes at the end.
        lr, momentum, weight_decay, epochs, batch_size: of the fine-tuning.
        scope: `head`: class rows alone (released code), or `all`: hidden neurons too.
        norms: `first`: batch norms use the statistics of a batch in the first epoch, and running ones after it; `train`: those of a batch in all.
        relative: measure weights in standard deviations of their layer, so that large ones exist.
    """

    select: str = "lowest"
    eta: float = 0.9
    alpha: float = 0.01
    beta: float = 0.5
    rho_max: float = 0.5
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    epochs: int = 10
    batch_size: int = 128
    scope: str = "all"
    norms: str = "first"
    relative: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.select not in ("lowest", "highest"):
            raise ConfigError(f"select must be 'lowest' or 'highest', got '{self.select}'")
        if self.scope not in ("head", "all"):
            raise ConfigError(f"scope must be 'head' or 'all', got '{self.scope}'")
        if self.norms not in ("first", "train"):
            raise ConfigError(f"norms must be 'first' or 'train', got '{self.norms}'")


class Wiper(Method):
    """Fine-tune with a penalty on the neurons that the benign task needs least (Fan et al., arXiv 2208.06537).

    Benign salience `S_t = eta S_{t-1} - (1 - eta) g_t theta_t` ranks neurons within each layer; the bad share
    `rho_e = beta + (rho_max - beta) e / E` is pulled towards zero by `R(theta) = |theta|` up to 1 and
    `exp(|theta| - 1)` beyond, `loss = CE + alpha * mean_bad R * size`.

    Changed on purpose: salience comes from the clean loss alone (the released code lets the penalty into it); the penalty
    touches the selected weights alone (released: all weights up to 1); large negative weights are punished, not rewarded;
    biases are left out. `select` is `lowest` as the paper means it, where the released code takes the highest. From the second epoch
    on batch norms use their running statistics (`norms`).
    """

    name = "wiper"
    config_class = WiperConfig
    config: WiperConfig
    trains = True
    spreads = False

    def purify(self, ctx: Context) -> Verdict:
        config = self.config
        index = ctx.index.where(role="head")
        if config.scope == "all" or not len(index):
            index = NeuronIndex((*ctx.neurons().groups, *index.groups), ctx.index.keys)
        norms = any(hasattr(m, "running_mean") for m in ctx.model.modules())
        salience = self._salience(ctx, index)
        slices = [(g, [(p, get_tensor(ctx.model, p.param)) for p in _weights(ctx, g)]) for g in index]
        scale = {p.param: float(w.detach().float().std()) or 1.0 for _, parts in slices for p, w in parts}
        bad = torch.zeros(len(index), dtype=torch.bool)
        strength = config.alpha * 256  # 512 x 10 weights of mean size 0.05 give a penalty near 2.6

        def penalty() -> Tensor:
            total, count = torch.zeros((), device=ctx.device), 0
            for (group, parts), flags in zip(slices, bad.split(index.sizes), strict=True):
                picked = flags.nonzero().flatten().to(ctx.device)
                for part, weight in parts if len(picked) else ():
                    size = owned(weight, part, group.size).index_select(0, picked).float().abs() / (
                        scale[part.param] if config.relative else 1.0
                    )
                    total = total + torch.where(size <= 1, size, torch.exp((size - 1).clamp(max=10))).sum()
                    count += size.numel()
            return strength * total / max(1, count)

        steps = max(1, -(-len(ctx.data) // config.batch_size))
        bad |= self._bad(index, salience, 1 / config.epochs)

        taken = torch.zeros((), dtype=torch.long)

        def objective(batch: dict[str, Tensor]) -> Tensor:
            if config.norms == "first" and int(taken) >= steps:
                ctx.model.eval()  # `relearn` has set the mode of the first epoch, and sets all modes back
            return ctx.loss(batch).mean()

        def follow(step: int) -> None:
            taken.fill_(step)
            if step % steps == 0 and step // steps < config.epochs:
                salience.copy_(config.eta * salience + (1 - config.eta) * self._salience(ctx, index))
                bad.copy_(self._bad(index, salience, (step // steps + 1) / config.epochs))

        train = TrainConfig(
            epochs=config.epochs,
            batch_size=config.batch_size,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            clip=5.0,
            mode="train" if norms else "eval",
        )
        relearn(
            ctx,
            train,
            index=ctx.index,
            removed=ctx.removed,
            objective=objective,
            penalty=penalty,
            after_step=follow,
            changed=[bad, salience, taken],
            title="WIPER",
        )
        score = index.standardize(salience) * (-1 if config.select == "lowest" else 1)
        notes = {"select": config.select, "bad neurons at the end": int(bad.sum()), "neurons judged": len(index)}
        return Verdict(ctx.index.embed(index, score, fill=0.0), torch.ones(len(ctx.index)), notes=notes)

    def _salience(self, ctx: Context, index: NeuronIndex) -> Tensor:
        """One pass over the clean samples: one backward pass a batch, no weight step."""
        batches = (fetch(ctx, rows) for rows in torch.arange(len(ctx.data)).split(self.config.batch_size))
        with mode(ctx.model, "eval"), ctx.recomputing():
            found = benign_salience(ctx.model, index, ctx.loss, batches, self.config.eta).to(ctx.device)
        ctx.average(found)
        return found.cpu()

    def _bad(self, index: NeuronIndex, salience: Tensor, progress: float) -> Tensor:
        """The bad share of each layer, at least one neuron."""
        rho = self.config.beta + (self.config.rho_max - self.config.beta) * progress
        flags = []
        for part in salience.split(index.sizes):
            order = part.argsort(descending=self.config.select == "highest")
            flag = torch.zeros(len(part), dtype=torch.bool)
            flag[order[: max(1, round(rho * len(part)))]] = True
            flags.append(flag)
        return torch.cat(flags)


def _weights(ctx: Context, group: object) -> list[ParamSlice]:
    """The weight slices of a group that are parameters; biases and shifts are left out."""
    names = dict(ctx.model.named_parameters())
    return [p for p in group.params if p.param.endswith("weight") and p.param in names]  # type: ignore[attr-defined]
