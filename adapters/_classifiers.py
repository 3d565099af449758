"""What classifiers share whose batch holds one tensor of inputs: losses of mixed labels, the number of classes, plain modules saved."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from hf_purify.adapter import Adapter, Batch, Loaded
from hf_purify.discovery import discover
from hf_purify.errors import ModelError
from hf_purify.neurons import NeuronIndex

from ._checkpoints import check_weights, of_live


class Classifier(Adapter):
    """A modality of classifiers: a batch holds inputs under `key`, and `labels`."""

    key: ClassVar[str]

    @abstractmethod
    def wrap(self, model: nn.Module, processor: Any, labels: list[str] | None) -> Loaded:
        """Take a plain module."""

    @abstractmethod
    def load_folder(self, folder: Path, source: str, revision: str | None) -> Loaded:
        """Load a checkpoint folder; `source` is the name it goes by."""

    def load(self, source: Any, **options: Any) -> Loaded:
        """Load a checkpoint folder, or wrap an `nn.Module`, given with `processor` and `labels`.

        Raises:
            ModelError: no classifier of this modality, NaN or quantized weights, missing tensors.
        """
        if isinstance(source, nn.Module):
            loaded = self.wrap(source, options.get("processor"), options.get("labels"))
        else:
            loaded = self.load_folder(Path(source), str(options.get("name") or source), options.get("revision"))
        check_weights(loaded.model)
        return loaded

    def classes(self, loaded: Loaded) -> int:
        return count_classes(loaded)

    def arranged(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Inputs as this model takes them."""
        return inputs

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        out = model(self.arranged(model, batch[self.key]))
        return out if isinstance(out, Tensor) else out.logits

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross entropy `(B,)`; of mixed inputs, the two labels' entropies in the inputs' shares."""
        return self.both(model, batch)[1]

    def both(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = self.logits(model, batch).float()
        return logits, _losses(logits, batch)

    def mix(self, batch: Batch, partner: Tensor, share: Tensor) -> Batch:
        """MixUp of inputs and labels with one share for all."""
        mixed = self.mixed(batch[self.key], batch[self.key][partner], share)
        return {self.key: mixed, "labels": batch["labels"], "partner_labels": batch["labels"][partner], "share": share}

    def mixed(self, inputs: Tensor, others: Tensor, share: Tensor) -> Tensor:
        """Inputs mixed value by value (Zhang et al., ICLR 2018)."""
        return mix_values(inputs, others, share)

    def index(self, loaded: Loaded, batch: Batch) -> NeuronIndex:
        weight = next((p for p in loaded.model.parameters() if p.is_floating_point()), batch[self.key])
        some = {self.key: batch[self.key][:2].to(weight.device, weight.dtype)}
        found = discover(loaded.model, lambda m: self.logits(m, some), self.classes(loaded))
        return NeuronIndex(found.groups, loaded.keys)


def mix_values(inputs: Tensor, others: Tensor, share: Tensor) -> Tensor:
    """`share` of the ones, the rest of the others."""
    part = share.to(inputs.dtype)
    return part * inputs + (1 - part) * others


def _losses(logits: Tensor, batch: Batch) -> Tensor:
    """Cross entropy `(B,)`, of mixed inputs in their shares."""
    loss = F.cross_entropy(logits, batch["labels"], reduction="none")
    if "partner_labels" in batch:
        other = F.cross_entropy(logits, batch["partner_labels"], reduction="none")
        loss = batch["share"] * loss + (1 - batch["share"]) * other
    return loss


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
    """A model that is in memory already; a plain module is saved as its weights alone."""
    if hasattr(model, "save_pretrained") and hasattr(model, "config"):
        return of_live(model, processor, labels)
    return Loaded(model, processor, list(labels or []), type(model).__name__, "module", None, None, {}, _save)


def _save(model: nn.Module, out: Path) -> None:
    from safetensors.torch import save_model

    out.mkdir(parents=True, exist_ok=True)
    save_model(model, str(out / "model.safetensors"))
