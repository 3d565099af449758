"""What a modality must say about itself: the `Adapter` and the `Examples` it makes. Data about models, never a fork of one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from hf_purify.errors import ConfigError
from hf_purify.neurons import NeuronIndex

Batch = dict[str, Tensor]


class Examples(Protocol):
    """Samples of a modality, decoded once, with a view for everything that is done to them."""

    labels: Tensor

    def __len__(self) -> int: ...

    def raw(self, i: int) -> Any:
        """Sample `i` as the data set holds it, triggered where the view says so: what a person would look at."""

    def batch(self, indices: Tensor) -> Batch:
        """Samples `(b,)` ready for the model, with their `labels` `(b,)`, on the CPU."""

    def select(self, indices: Tensor) -> Examples:
        """A view on some samples."""

    def overlay(self, indices: Tensor, transform: Callable[[Any, int], Any], labels: Tensor, seed: int) -> Examples:
        """A view in which `transform(raw, seed)` is applied to samples `indices`, which get `labels`."""


@dataclass
class Loaded:
    """A model with all that is needed to feed it and to save it again.

    Args:
        model: the network, in the checkpoint's dtype.
        processor: turns raw examples into model input.
        labels: class names, in order; empty where the checkpoint names none.
        source: name or path that was given.
        kind: `transformers`, `timm` or `module`.
        revision: the commit on the Hub, or None.
        folder: where the checkpoint's files lie, or None.
        keys: parameter name -> checkpoint key, where they differ.
        saver: writes the checkpoint to a folder.
    """

    model: nn.Module
    processor: Any
    labels: list[str] = field(default_factory=list)
    source: str = ""
    kind: str = "module"
    revision: str | None = None
    folder: Path | None = None
    keys: Mapping[str, str] = field(default_factory=dict)
    saver: Callable[[nn.Module, Path], None] | None = None


@dataclass
class Tiny:
    """A random model with eight examples: feeds the contract tests."""

    loaded: Loaded
    data: Examples
    classes: int


class StandIn(nn.Module, ABC):
    """Recovered triggers, each leading to a class: what a defender can make of clean samples alone. Its parameters are theirs.

    A subclass is one kind of trigger; as built, before any inversion, it changes next to nothing.

    Args:
        data: clean samples, which give the shape and the range of an input.
        classes: `(S,)` the class that each one leads to; a class may be there more than once.
        generator: of the first values.
    """

    late: ClassVar[bool] = False  # looked for only where no other kind leads to one class alone
    classes: Tensor

    def __init__(self, data: Examples, classes: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("classes", classes)

    @abstractmethod
    def place(self, batch: Batch, which: Tensor) -> Batch:
        """Put recovered trigger `which[i]` on example `i`, differentiably; labels stay."""

    @abstractmethod
    def size(self) -> Tensor:
        """`(S,)` how much of an example each one changes, from 0 up; comparable within a kind only."""

    @abstractmethod
    def shrink(self, limits: Tensor) -> None:
        """Bring each one's size down to its limit `(S,)`, in place."""


class Adapter(ABC):
    """One modality. Subclasses hold no state about a model; everything they need comes as arguments."""

    name: ClassVar[str]
    task: ClassVar[str]
    variants: ClassVar[tuple[str, ...]]  # kinds of network that `tiny` makes

    @abstractmethod
    def load(self, source: Any, **options: Any) -> Loaded:
        """Load model and processor from a folder, a Hub id, or wrap a module. Safetensors only, no remote code."""

    @abstractmethod
    def examples(self, data: Any, loaded: Loaded, **options: Any) -> Examples:
        """Read a data set for a model; columns are found by their features or named."""

    @abstractmethod
    def classes(self, loaded: Loaded) -> int:
        """Number of classes of a model."""

    def class_names(self, data: Any, split: str | None, label: str | None) -> list[str]:
        """Class names of a data set, in order."""
        raise ConfigError(f"the {self.name} adapter cannot read class names; give classes=...")

    @abstractmethod
    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Forward pass: `(B, classes)`."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Loss per example `(B,)`, of mixed batches too."""

    @abstractmethod
    def mix(self, batch: Batch, partner: Tensor, share: Tensor) -> Batch:
        """MixUp for this modality: example `i` with example `partner[i]`, weights `share` and `1 - share` (a scalar)."""

    def augment(self, batch: Batch, generator: torch.Generator, kind: str) -> Batch:
        """Label-preserving augmentation of a training batch on the CPU; `kind` is one of `augmentations`."""
        return batch

    def augmentations(self) -> list[str]:
        """Kinds of augmentation, strongest first; a repair uses the first one under which the model keeps its accuracy."""
        return []

    @abstractmethod
    def prepare(self, raws: list[Any], loaded: Loaded) -> Tensor:
        """Raw examples as model input."""

    @abstractmethod
    def index(self, loaded: Loaded, batch: Batch) -> NeuronIndex:
        """All neurons of a model, found with the help of a small batch."""

    @abstractmethod
    def triggers(self) -> dict[str, type]:
        """Trigger classes by name."""

    def stand_ins(self) -> dict[str, type[StandIn]]:
        """Kinds of trigger that can be recovered, by name. The first is assumed of a trigger of which only the class is known.

        Raises:
            ConfigError: none for this modality.
        """
        raise ConfigError(f"triggers cannot be recovered for {self.name}: choose a method that does without, such as ft_sam")

    @abstractmethod
    def tiny(self, variant: str | None = None, seed: int = 0) -> Tiny:
        """A random model of one of the `variants` with eight examples, offline, in under a second."""

    def locate(self, source: str) -> str | None:
        """The Hub repository that a name stands for in this modality's own libraries, or None."""
        return None

    def create(self, architecture: str, classes: int, **options: Any) -> Loaded:
        """A model with random weights, to be trained from scratch."""
        raise ConfigError(f"the {self.name} adapter creates no new models; give a checkpoint")

    def read(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Predicted classes and losses, `(B,)` each; a modality that can gives both from one forward pass."""
        return self.predict(model, batch), self.loss(model, batch)

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """Predicted classes `(B,)`."""
        return self.logits(model, batch).argmax(-1)
