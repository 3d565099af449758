"""A recipe's model on its device, with its modality: what every job works with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import set_seed

from hf_purify import hub
from hf_purify.adapter import Adapter, Examples, Loaded
from hf_purify.errors import ConfigError, did_you_mean
from hf_purify.loop import Task
from hf_purify.recipe import ImplantRecipe, Recipe
from hf_purify.registry import find, names


@dataclass
class Session:
    """A loaded model on its device, with its modality."""

    recipe: Recipe
    adapter: Adapter
    accelerator: Accelerator
    loaded: Loaded
    classes: int

    @property
    def model(self) -> torch.nn.Module:
        return self.loaded.model

    @property
    def classifies(self) -> bool:
        return self.adapter.classifies(self.loaded)

    def task(self, data: Examples, augmentation: str = "none") -> Task:
        """The model with data to train or to judge it on."""
        generator = torch.Generator().manual_seed(self.recipe.seed)
        return Task(self.model, self.adapter, data, generator, self.accelerator, augmentation)

    def read(self, data: Any, split: str | None = None, samples: int | None = None, shuffled: bool = False) -> Examples:
        """Read a data set for this model, with the recipe's columns.

        Args:
            samples: draw so many, class-balanced; None takes all.
            shuffled: take all in a seeded order, not as they lie.
        """
        recipe = self.recipe
        for role in recipe.columns:
            if role not in self.adapter.columns:
                known = self.adapter.columns
                raise ConfigError(f"columns of {self.adapter.name} are {', '.join(known)}; got '{role}'{did_you_mean(role, known)}")
        return self.adapter.examples(
            data,
            self.loaded,
            split=split,
            samples=samples,
            balanced=shuffled or samples is not None,
            seed=recipe.seed,
            columns=recipe.columns,
            to_rgb=recipe.to_rgb,
        )


def open_session(recipe: Recipe) -> Session:
    """Load the recipe's model, pinned and safe, and place it on its device."""
    set_seed(recipe.seed)
    accelerator = make_accelerator(recipe)
    adapter, loaded = load(recipe)
    loaded.model.to(accelerator.device)
    if recipe.channels_last:
        loaded.model.to(memory_format=torch.channels_last)
    if recipe.compile:
        loaded.model.compile()
    return Session(recipe, adapter, accelerator, loaded, adapter.classes(loaded))


def make_accelerator(recipe: Recipe) -> Accelerator:
    """An `Accelerator` for the recipe's device and precision.

    accelerate keeps both once for the whole process. What an earlier job of hf-purify left there is made anew; what the caller or a
    `Trainer` set up is respected.

    Raises:
        ConfigError: the device is not there, or the caller's own `Accelerator` has another one or another precision.
    """
    if recipe.device not in (None, "cpu") and not torch.cuda.is_available() and str(recipe.device).startswith("cuda"):
        raise ConfigError(f"device '{recipe.device}' was asked for, but no CUDA device is available")
    # accelerate has no public way to start over within a process; its own tests use this one
    if AcceleratorState._shared_state.get("made_by_hf_purify"):
        AcceleratorState._reset_state(reset_partial_state=PartialState().num_processes == 1)
    theirs = AcceleratorState._shared_state != {}
    try:
        accelerator = Accelerator(cpu=recipe.device == "cpu", mixed_precision=recipe.precision)
    except ValueError as error:
        raise ConfigError(
            f"this process has an Accelerator already, which does not go with device={recipe.device!r}, precision={recipe.precision!r}; leave "
            f"them out or run in a process of its own ({error})"
        ) from error
    if not theirs:
        accelerator.state.made_by_hf_purify = True
    return accelerator


def load(recipe: Recipe) -> tuple[Adapter, Loaded]:
    """The recipe's model with its modality: one that is loaded already, a module, a new one to be trained, or a checkpoint."""
    named = [find("adapter", recipe.adapter)()] if recipe.adapter else []
    if isinstance(recipe.model, (Loaded, torch.nn.Module)):
        adapter = named[0] if named else find("adapter", "vision")()
        loaded = recipe.model
        return adapter, loaded if isinstance(loaded, Loaded) else adapter.load(loaded, processor=recipe.processor, labels=recipe.labels)
    name = str(recipe.model)
    if isinstance(recipe, ImplantRecipe) and recipe.create:
        adapter = creator(recipe)
        return adapter, adapter.create(name, recipe.classes or 0, **recipe.model_options, **prompt_settings(recipe, adapter))
    known = named or [find("adapter", n)() for n in names("adapter")]
    place = next((found for adapter in known if (found := adapter.locate(name))), name)
    pulled = hub.pull(place, recipe.revision)
    config = hub.read_config(pulled.folder)
    adapter = next((a for a in known if a.claims(config)), known[0])
    return adapter, adapter.load(pulled.folder, name=name, revision=pulled.revision, **prompt_settings(recipe, adapter))


def prompt_settings(recipe: Recipe, adapter: Adapter) -> dict[str, Any]:
    """The recipe's settings of how a model is fed, for an adapter that has such.

    Raises:
        ConfigError: one is given, and the modality has none.
    """
    given = {k: v for k in ("template", "max_length", "cut") if (v := getattr(recipe, k)) is not None}
    for name in given:
        if name not in adapter.prompt_settings:
            raise ConfigError(f"the setting '{name}' is for models of text; this is one of {adapter.name}")
    return given


def creator(recipe: ImplantRecipe) -> Adapter:
    """The modality that makes the new model of a recipe: the one that is named, else the first that knows the architecture."""
    if recipe.adapter:
        return find("adapter", recipe.adapter)()
    known = [find("adapter", n)() for n in names("adapter")]
    return next((a for a in known if a.creates(str(recipe.model))), find("adapter", "vision")())
