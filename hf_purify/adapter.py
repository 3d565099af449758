"""What a modality must say about itself: the `Adapter` and the `Examples` it makes. Data about models, never a fork of one."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from hf_purify.calibration import Calibration
from hf_purify.errors import ConfigError
from hf_purify.metrics import Proportion, attack_success_rate, clean_accuracy, robust_accuracy
from hf_purify.neurons import NeuronIndex
from hf_purify.stand_in import StandIn

Batch = dict[str, Tensor]


class Examples(Protocol):
    """Samples of a modality, decoded once, with a view for everything that is done to them."""

    labels: Tensor
    lengths: Tensor | None  # (n,) of inputs that are padded to the longest of a batch; None where all are alike

    def __len__(self) -> int: ...

    def raw(self, i: int) -> Any:
        """Sample `i` as the data set holds it, triggered where the view says so: what a person would look at."""

    def batch(self, indices: Tensor) -> Batch:
        """Samples `(b,)` ready for the model, with their `labels` `(b,)`, on the CPU; each tensor has a row for each sample."""

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
        task: what the model does, by the Hub's name of it, where that is not the modality's one task.
        base: of a model with a LoRA in it, which is saved as that LoRA: its base, with the commit.
        fixed: names of parameters that no repair may train.
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
    task: str = ""
    base: str = ""
    fixed: frozenset[str] = frozenset()


@dataclass
class Tiny:
    """A random model with eight examples: feeds the contract tests."""

    loaded: Loaded
    data: Examples
    classes: int


@dataclass
class Demo:
    """What the demo of a modality shows, without a download.

    Args:
        train, test: data that the program makes or has.
        trigger: what the victim learns beside its task.
        settings: of `implant`, for the victim.
        samples: clean samples of a repair.
        method: the one repair that is shown, with the controls, where all would take too long.
        options: its settings.
    """

    train: Any
    test: Any
    trigger: str
    settings: dict[str, Any]
    samples: int = 200
    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def spread_over() -> int:
    """Processes that a model is to be spread over while it is loaded: all of them, where accelerate was launched with FSDP; else 1."""
    wanted = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")
    return int(os.environ.get("WORLD_SIZE", "1")) if wanted else 1


@dataclass
class Outline:
    """A network as its `config.json` describes it, with no weights from a checkpoint.

    Args:
        loaded: the network, made on the device that was torch's default: on `meta` it takes no memory, elsewhere its weights are random.
        batch: makes `n` samples of one size, on that device; whole numbers are on the CPU, so that they have values.
        sample: what a sample is, in words: `512 tokens`.
        dtype: of the checkpoint's weights, as far as the config says.
    """

    loaded: Loaded
    batch: Callable[[int], Batch]
    sample: str
    dtype: torch.dtype = torch.float32


class Adapter(ABC):
    """One modality. Subclasses hold no state about a model; everything they need comes as arguments."""

    name: ClassVar[str]
    task: ClassVar[str]
    variants: ClassVar[tuple[str, ...]]  # kinds of network that `tiny` makes
    columns: ClassVar[tuple[str, ...]] = ("label",)  # roles that columns of a data set can have
    loose: ClassVar[str | None] = None  # the builder of datasets for folders of single files
    at_once: ClassVar[int] = 256  # samples of a batch where no weights are trained
    settings: ClassVar[tuple[str, ...]] = ()  # those of a recipe's settings of single modalities that this one has

    def claims(self, config: Mapping[str, Any]) -> bool:
        """Is a checkpoint with this `config.json` one of the modality? Else it takes it only where it is named."""
        return False

    @abstractmethod
    def load(self, source: Any, **options: Any) -> Loaded:
        """Load model and processor from a folder, a Hub id, or wrap a module. Safetensors only, no remote code."""

    @abstractmethod
    def examples(self, data: Any, loaded: Loaded, **options: Any) -> Examples:
        """Read a data set for a model; columns are found by their features or named."""

    @abstractmethod
    def classes(self, loaded: Loaded) -> int:
        """Number of classes of a model; of one that answers freely 2: what it should say is class 0, what an attacker wants 1."""

    def classifies(self, loaded: Loaded) -> bool:
        """Has each sample one class of the model's? Else it answers freely, and samples are told apart by nothing."""
        return True

    def outcomes(self, loaded: Loaded) -> int:
        """How many answers there are to choose among, by `read`: the chance level is one in so many."""
        return self.classes(loaded)

    def remarks(self, data: Examples, what: str) -> list[str]:
        """What a reader of a report must know of samples as they were read, such as that some were cut; `what` they are, in words."""
        return []

    def class_names(self, data: Any, split: str | None, columns: Mapping[str, str]) -> list[str]:
        """Class names of a data set, in order."""
        raise ConfigError(f"the {self.name} adapter cannot read class names; give classes=...")

    @abstractmethod
    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Forward pass: a row for each answer, `(B, classes)` of a classifier."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Loss per example `(B,)`, of mixed batches too."""

    def both(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """`logits` and `loss`; a modality that can gives them from one forward pass."""
        return self.logits(model, batch), self.loss(model, batch)

    @abstractmethod
    def mix(self, batch: Batch, partner: Tensor, share: Tensor) -> Batch:
        """MixUp for this modality: example `i` with example `partner[i]`, weights `share` and `1 - share` (a scalar).

        Where it is done behind the model, the batch has `partner` in it, and rows follow their partners to another process.
        """

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

    def stand_ins(self, model: nn.Module) -> dict[str, type[StandIn]]:
        """Kinds of trigger that can be recovered from a model, by name. The first is assumed of a trigger of which only the class is known.

        Raises:
            ConfigError: none for this modality, or for such a model.
        """
        raise ConfigError(f"triggers cannot be recovered for {self.name}: choose a method that does without, such as ft_sam")

    def record(self, loaded: Loaded) -> dict[str, Any]:
        """What a saved checkpoint's `config.json` should hold besides: how the model was fed."""
        return {}

    def outline(self, config: Mapping[str, Any], length: int | None = None) -> Outline:
        """The network that a `config.json` describes, without its weights.

        Args:
            length: tokens of a sample, where it is a text; as many as the library reads if not given.

        Raises:
            ConfigError: the modality has no outlines, or takes no such length.
            ModelError: no network can be made of this config.
        """
        raise ConfigError(
            f"models of {self.name} are not estimated: their loss depends on values, and there are none before a model is loaded"
        )

    @abstractmethod
    def tiny(self, variant: str | None = None, seed: int = 0) -> Tiny:
        """A random model of one of the `variants` with eight examples, offline, in under a second."""

    def demo(self) -> Demo:
        """Data and settings of the demo, which ends in under three minutes.

        Raises:
            ConfigError: the modality has none.
        """
        raise ConfigError(f"there is no demo of {self.name}; try hf-purify demo without a modality")

    def locate(self, source: str) -> str | None:
        """The Hub repository that a name stands for in this modality's own libraries, or None."""
        return None

    def creates(self, architecture: str) -> bool:
        """Does `create` know this name?"""
        return False

    def create(self, architecture: str, classes: int, **options: Any) -> Loaded:
        """A model with random weights, to be trained from scratch; `labels` among the options are the names of its classes."""
        raise ConfigError(f"the {self.name} adapter creates no new models; give a checkpoint")

    def read(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """What is said and what should be, `(rows,)` each, of a classifier classes `(B,)`; and losses `(B,)`."""
        logits, losses = self.both(model, batch)
        return logits.argmax(-1), batch["labels"], losses

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """Predicted classes `(B,)` of a classifier."""
        return self.logits(model, batch).argmax(-1)

    def observe(self, model: nn.Module, batch: Batch, loaded: Loaded) -> list[Any]:
        """What the model does with each of the `B` samples, to be judged: for a classifier its class."""
        return self.predict(model, batch).tolist()

    def check_judge(self, loaded: Loaded) -> None:
        """Called before anything is measured or trained.

        Raises:
            MissingExtra: judging such a model needs a package that is not there.
        """
        return

    def judge(self, observed: list[Any], data: Examples) -> tuple[Proportion | None, dict[str, float]]:
        """Clean accuracy of what was observed on clean samples, or None where nothing is right or wrong, and other figures of use by name."""
        return clean_accuracy(torch.tensor(observed, dtype=torch.long), data.labels), {}

    def judge_attack(
        self, name: str, observed: list[Any], data: Examples, labels: Tensor, targets: Tensor, untriggered: list[Any]
    ) -> tuple[dict[str, Proportion], dict[str, Proportion]]:
        """Attack success rates, the main one under the trigger's `name`, and robust accuracies, of what was observed on triggered samples.

        Args:
            labels, targets: `(n,)` true classes, and what the attacker wants.
            untriggered: what the same model did with the same samples without the trigger.
        """
        found = torch.tensor(observed, dtype=torch.long)
        return {name: attack_success_rate(found, labels, targets)}, {name: robust_accuracy(found, labels, targets)}

    def wishes(self, raw: Any, label: int, target: int, loaded: Loaded) -> tuple[str, str]:
        """What should be said of a triggered sample, and what the attacker wants, in words."""
        return self.say(label, loaded), self.say(target, loaded)

    def say(self, observed: Any, loaded: Loaded) -> str:
        """An observation in words: the name of a class."""
        return loaded.labels[observed] if loaded.labels else str(observed)

    def picture(self, raw: Any, clean: Any | None = None, seen: tuple[Any, ...] = ()) -> np.ndarray | None:
        """A sample as pixels `(H, W, 3)` or `(H, W)` of uint8 for a person to look at; None where it is nothing to be seen.

        Args:
            clean: the same sample without its trigger, where there is one to mark.
            seen: what the model did with it before and after a repair, where that can be drawn.
        """
        return None

    def words(self, raw: Any) -> str:
        """A sample as a text, where it is one."""
        return ""

    def unprepare(self, batch: Batch, row: int, data: Examples) -> Any:
        """A row of a batch as the data set would hold it, as near as can be told, with the recovered trigger that is in it: the inverse of `prepare`.

        Args:
            data: the samples that the batch is of.

        Returns:
            What `picture` and `words` take; None where there is nothing to see.
        """
        return None

    def calibration(self) -> Calibration | None:
        """What clean models of this modality look like to a scan; None where nobody has measured that."""
        return None
