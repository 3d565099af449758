"""ULRL: unlearn and relearn."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_purify.errors import ConfigError, ModelError
from hf_purify.loop import TrainConfig
from hf_purify.method import Context, Method, MethodConfig, Verdict
from hf_purify.neurons import NeuronIndex, get_tensor, owned
from hf_purify.routines import relearn, reset_neurons, unlearn
from hf_purify.salience import mad_outliers, mad_scores, weight_change


@dataclass(frozen=True)
class ULRLConfig(MethodConfig):
    """Settings of ULRL; the defaults are the paper's for CIFAR-10.

    Args:
        unlearn_lr, unlearn_steps: of the ascent, which controls itself. None: 0.01 with batch norms, 0.001 elsewhere.
        cut: MAD score above which a class row is suspicious.
        at_most: rows that may be suspicious, largest first.
        lr, epochs, batch_size: of the relearning, cosine to zero.
        alpha: weight of the cosine between a reset row and its old weights.
        unit: `rows` of the classifier, `hidden` units, or `auto`: rows from five classes on.
    """

    unlearn_lr: float | None = None
    unlearn_steps: int = 400
    cut: float = 3.5
    at_most: int = 2
    lr: float = 0.005
    epochs: int = 20
    batch_size: int = 128
    alpha: float = 0.7
    unit: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unit not in ("auto", "rows", "hidden"):
            raise ConfigError(f"unit must be 'auto', 'rows' or 'hidden', got '{self.unit}'")


class ULRL(Method):
    """Reset the neurons that unlearning moves most, and relearn away from them (Min, Pham & Sun, arXiv 2405.14781).

    1. Ascend the clean loss over all weights until the clean task is forgotten.
    2. `NWC_k = sum_j |W1[k, j] - W0[k, j]|` for each classifier row; suspicious are upper outliers by the MAD rule.
    3. From the original weights: draw suspicious rows anew, and fine-tune everything with
       `CE + alpha * sum_k cos(W_k, W0_k)` over the suspicious rows.

    Changed on purpose: at most two rows are kept by their change, not by their position; a MAD of zero flags nothing
    instead of dividing by zero; gradients are clipped in the ascent, and its rate adapts. With fewer than five classes
    the rule has nothing to stand on, and hidden units are judged instead, within each layer, at most one in a hundred.
    Without an outlier ULRL is plain fine-tuning; the report says so.
    """

    name = "ulrl"
    config_class = ULRLConfig
    config: ULRLConfig
    trains = True
    spreads = False
    begins = "the rows of the suspected classes, or the suspected hidden units, in the place of its outliers"

    def purify(self, ctx: Context) -> Verdict:
        config = self.config
        head = ctx.index.where(role="head")
        rows = config.unit == "rows" or (config.unit == "auto" and ctx.classes >= 5 and len(head) > 0)
        index = head if rows else ctx.neurons()
        if not len(index):
            raise ModelError("ulrl needs a classifier layer with one row per class, and found none; use unit='hidden'")
        norms = any(hasattr(m, "running_mean") for m in ctx.model.modules())
        before = {n: p.detach().clone() for n, p in ctx.model.named_parameters()}
        with ctx.copy():
            forgotten = unlearn(
                ctx,
                ctx.reading,
                ctx.classes,
                lr=config.unlearn_lr if config.unlearn_lr is not None else 0.01 if norms else 1e-3,
                max_steps=config.unlearn_steps,
                config=TrainConfig(steps=1, batch_size=config.batch_size),
            )
            after = {n: p.detach() for n, p in ctx.model.named_parameters()}
            gates = {g.gate.param for g in index} if rows else None
            scores = weight_change(index, before, {n: p for n, p in after.items() if gates is None or n in gates})
        chosen = self._found(ctx, index, rows)
        if not len(chosen):
            chosen = self._outliers(ctx, index, scores, rows)
        flags = torch.zeros(len(index), dtype=torch.bool)
        flags[chosen] = True
        old = [(get_tensor(ctx.model, g.gate.param), g, f) for g, f in zip(index, flags.split(index.sizes), strict=True) if f.any()]
        anchors = [(w, g, f, owned(w.detach().clone(), g.gate, g.size)[f].flatten(1)) for w, g, f in old]
        reset_neurons(ctx.model, index, flags, ctx.generator)

        def away() -> Tensor:
            total = torch.zeros((), device=ctx.device)
            for weight, group, flag, anchor in anchors:
                current = owned(weight, group.gate, group.size)[flag].flatten(1)
                total = total + F.cosine_similarity(current.float(), anchor.float(), dim=1).sum()
            return config.alpha * total

        relearn(
            ctx,
            TrainConfig(
                epochs=config.epochs, batch_size=config.batch_size, lr=config.lr, schedule="cosine", mode="train" if norms else "eval"
            ),
            index=ctx.index,
            removed=ctx.removed,
            penalty=away if anchors else None,
            title="ULRL relearn",
        )
        notes = {
            "unlearning steps": forgotten.steps,
            "accuracy after unlearning": forgotten.accuracy,
            "suspicious": [f"{index.locate(int(i))[0]}[{index.locate(int(i))[1]}]" for i in chosen[:10]] or "none: plain fine-tuning",
            "unit": "rows" if rows else "hidden",
        }
        return Verdict(ctx.index.embed(index, mad_scores(scores), fill=0.0), torch.ones(len(ctx.index)), notes=notes)

    def _found(self, ctx: Context, index: NeuronIndex, rows: bool) -> Tensor:
        """What a scan suspects, as positions in `index`; none without one."""
        if ctx.finding is None:
            return torch.empty(0, dtype=torch.long)
        if rows:
            return torch.tensor([k for k in ctx.finding.targets if k < len(index)], dtype=torch.long)
        parts = ctx.index.split(ctx.finding.neurons)
        return torch.cat([parts[g.name] for g in index]).nonzero().flatten()

    def _outliers(self, ctx: Context, index: object, scores: Tensor, rows: bool) -> Tensor:
        if rows:
            return mad_outliers(scores, self.config.cut, self.config.at_most)
        found, offset = [], 0
        for part in scores.split(index.sizes):  # type: ignore[attr-defined]
            found.append(offset + mad_outliers(part, self.config.cut, max(1, math.ceil(0.01 * len(part)))))
            offset += len(part)
        return torch.cat(found)
