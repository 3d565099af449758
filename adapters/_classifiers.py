"""What classifiers share whose batch holds one tensor of inputs: losses of mixed labels, the number of classes, plain modules saved."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from hf_purify.adapter import Batch, Loaded
from hf_purify.errors import ModelError


def losses(logits: Tensor, batch: Batch) -> Tensor:
    """Cross entropy `(B,)`; of mixed inputs, the two labels' entropies in the inputs' shares."""
    loss = F.cross_entropy(logits, batch["labels"], reduction="none")
    if "partner_labels" in batch:
        other = F.cross_entropy(logits, batch["partner_labels"], reduction="none")
        loss = batch["share"] * loss + (1 - batch["share"]) * other
    return loss


def mixed_labels(batch: Batch, partner: Tensor, share: Tensor) -> Batch:
    """What a mixed batch holds besides its inputs."""
    return {"labels": batch["labels"], "partner_labels": batch["labels"][partner], "share": share}


def mix_values(batch: Batch, key: str, partner: Tensor, share: Tensor) -> Batch:
    """MixUp of inputs value by value (Zhang et al., ICLR 2018)."""
    values = batch[key]
    mixed = share.to(values.dtype) * values + (1 - share.to(values.dtype)) * values[partner]
    return {key: mixed, **mixed_labels(batch, partner, share)}


def count_classes(loaded: Loaded) -> int:
    """Number of classes, from the model's config, its own word, its label names, or its last linear layer.

    Raises:
        ModelError: none of them says.
    """
    config = getattr(loaded.model, "config", None)
    for value in (getattr(config, "num_labels", None), getattr(loaded.model, "num_classes", None), len(loaded.labels) or None):
        if value:
            return int(value)
    linear = [m for m in loaded.model.modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise ModelError(
            "cannot tell the number of classes: the model has no config, no num_classes and no linear layer; pass labels=[...]"
        )
    return linear[-1].out_features


def of_module(model: nn.Module, processor: object, labels: list[str] | None) -> Loaded:
    """A plain module, which is saved as its weights alone."""
    return Loaded(model, processor, list(labels or []), type(model).__name__, "module", None, None, {}, _save)


def _save(model: nn.Module, out: Path) -> None:
    from safetensors.torch import save_model

    out.mkdir(parents=True, exist_ok=True)
    save_model(model, str(out / "model.safetensors"))
