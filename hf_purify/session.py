"""A recipe's model on its device, with its modality: what every job works with."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import set_seed

from hf_purify import hub, lora
from hf_purify.adapter import Adapter, Examples, Loaded, spread_over
from hf_purify.checkpointing import check_layers
from hf_purify.errors import ConfigError, ModelError, did_you_mean
from hf_purify.merged import merge
from hf_purify.output import versions
from hf_purify.recipe import ImplantRecipe, PurifyRecipe, Recipe
from hf_purify.registry import find, names
from hf_purify.resuming import Progress
from hf_purify.sharding import class_name, is_sharded
from hf_purify.states import fingerprint
from hf_purify.streaming import Drawn, draw_rows, is_stream
from hf_purify.tables import open_stream, pinned
from hf_purify.task import Task, snapshot
from hf_purify.tracking import begin, check_trackers

# where a job writes is no part of what it is
ELSEWHERE = ("output", "overwrite", "trackers", "logging_dir", "checkpoint_every", "push", "private", "create_pr")
log = get_logger(__name__)  # which speaks on the main process alone


@dataclass
class Session:
    """A loaded model on its device, with its modality.

    Args:
        classes: number of classes of the model.
        progress: checkpoints of the job, if it has any.
        streams: what was drawn from streams, by what the samples are for.
        commits: of the data sets that came from the Hub, likewise.
    """

    recipe: Recipe
    adapter: Adapter
    accelerator: Accelerator
    loaded: Loaded
    classes: int
    progress: Progress | None = None
    streams: dict[str, Drawn] = field(default_factory=dict)
    commits: dict[str, str | None] = field(default_factory=dict)

    @property
    def model(self) -> torch.nn.Module:
        return self.loaded.model

    @property
    def classifies(self) -> bool:
        return self.adapter.classifies(self.loaded)

    def task(self, data: Examples, augmentation: str = "none") -> Task:
        """The model with data to train or to judge it on."""
        generator = torch.Generator().manual_seed(self.recipe.seed)
        return Task(
            self.model,
            self.adapter,
            data,
            generator,
            self.accelerator,
            augmentation,
            fixed=self.loaded.fixed,
            recompute=self.recipe.gradient_checkpointing,
            accumulate=self.recipe.accumulate or self.accelerator.gradient_accumulation_steps,
            progress=self.progress,
        )

    def read(
        self, data: Any, split: str | None = None, samples: int | None = None, shuffled: bool = False, what: str = "clean samples"
    ) -> Examples:
        """Read a data set for this model, with the recipe's columns.

        Args:
            samples: draw so many, class-balanced; None takes all.
            shuffled: take all in a seeded order, not as they lie.
            what: the samples are, for reports.
        """
        recipe = self.recipe
        for role in recipe.columns:
            if role not in self.adapter.columns:
                known = self.adapter.columns
                raise ConfigError(f"columns of {self.adapter.name} are {', '.join(known)}; got '{role}'{did_you_mean(role, known)}")
        self.commits[what] = revision = pinned(data)
        if streamed(recipe, data):
            data, split = self.draw(data, split, samples, what, revision).rows, None
        return self.adapter.examples(
            data,
            self.loaded,
            split=split,
            revision=revision,
            samples=samples,
            balanced=shuffled or samples is not None,
            seed=recipe.seed,
            columns=recipe.columns,
            to_rgb=recipe.to_rgb,
        )

    def draw(self, data: Any, split: str | None, samples: int | None, what: str, revision: str | None = None) -> Drawn:
        """Draw samples from a stream, or from what is opened as one.

        Raises:
            ConfigError: no number of samples is given, or the stream is split among processes, which must all see the same samples.
        """
        if samples is None:
            raise ConfigError(
                f"a stream has no known end: say how many {what} are drawn from it (samples, --samples; of test data test_samples, --test-samples)"
            )
        stream = open_stream(data, split, self.adapter.loose, revision)
        if self.accelerator.num_processes > 1 and getattr(stream, "_distributed", None) is not None:
            raise ConfigError(
                "the stream is split among processes (split_dataset_by_node), which must all draw the same samples: give it whole"
            )
        hidden, label = not self.accelerator.is_main_process, self.recipe.columns.get("label")
        self.streams[what] = draw_rows(stream, samples, self.recipe.seed, self.recipe.stream_rows, label, self.classifies, hidden)
        return self.streams[what]


def streamed(recipe: Recipe, data: Any) -> bool:
    """Is data a stream, or a name that the recipe opens as one?"""
    return is_stream(data) or (recipe.streaming and isinstance(data, (str, Path)))


def open_session(recipe: Recipe) -> Session:
    """Load the recipe's model, pinned and safe, and place it on its device."""
    set_seed(recipe.seed)
    accelerator = make_accelerator(recipe)
    adapter, loaded = load(recipe)
    if spread_over() > 1 and not is_sharded(loaded.model):
        raise ModelError(
            f"accelerate was launched with FSDP, and '{loaded.source}' was not loaded so: that is for whole checkpoints of transformers. Launch without FSDP"
        )
    if is_sharded(loaded.model):
        spread: Any = loaded.model
        spread.set_reshard_after_forward(True)  # what stayed gathered after an evaluation would not see the next change
    loaded.model.to(accelerator.device)
    if recipe.channels_last:
        loaded.model.to(memory_format=torch.channels_last)
    if recipe.gradient_checkpointing:
        check_layers(loaded.model)
    if recipe.compile:
        loaded.model.compile()
    classes = adapter.classes(loaded)
    begin(accelerator, recipe.to_dict())
    return Session(recipe, adapter, accelerator, loaded, classes)


def open_progress(session: Session, data: Examples) -> None:
    """Begin the checkpoints of a job on this data where the recipe asks for them, or go on from those that are there.

    Raises:
        OutputError: those that are there are none, or of another job.
    """
    recipe = session.recipe
    folder = Path(f"{Path(recipe.output).expanduser().absolute()}.checkpoint") if recipe.output else None
    if folder is None or recipe.checkpoint_every is None:
        if folder is not None and folder.exists():
            log.warning(
                "a checkpoint of an interrupted job lies in '%s'; with checkpoint_every (--checkpoint-every) it would go on from there",
                folder,
            )
        return
    job = {k: v for k, v in recipe.to_dict().items() if k not in ELSEWHERE}
    samples = {"labels": data.labels} | data.batch(torch.arange(min(8, len(data))))
    found = {"model's weights": fingerprint(session.model.state_dict()), "samples": f"{len(data)}, {fingerprint(samples)}"}
    session.progress = Progress(folder, recipe.checkpoint_every, job | found, versions(), session.accelerator)


def make_accelerator(recipe: Recipe) -> Accelerator:
    """An `Accelerator` for the recipe's device and precision.

    accelerate keeps both once for the whole process. What an earlier job of hf-purify left there is made anew; what the caller or a
    `Trainer` set up is respected.

    Raises:
        UnknownName, MissingExtra: a tracker is not there.
        ConfigError: the device is not there, or the caller's own `Accelerator` has another one or another precision.
    """
    instead = take_zero3()
    if recipe.device not in (None, "cpu") and not torch.cuda.is_available() and str(recipe.device).startswith("cuda"):
        raise ConfigError(f"device '{recipe.device}' was asked for, but no CUDA device is available")
    # accelerate has no public way to start over within a process; its own tests use this one
    if AcceleratorState._shared_state.get("made_by_hf_purify"):
        AcceleratorState._reset_state(reset_partial_state=PartialState().num_processes == 1)
    check_trackers(recipe.trackers)
    theirs = AcceleratorState._shared_state != {}
    try:
        to = {"log_with": recipe.trackers, "project_dir": recipe.logging_dir} if recipe.trackers else {}
        accelerator = Accelerator(cpu=recipe.device == "cpu", mixed_precision=recipe.precision, **to)
    except ValueError as error:
        raise ConfigError(
            f"this process has an Accelerator already, which does not go with device={recipe.device!r}, precision={recipe.precision!r}; leave "
            f"them out or run in a process of its own ({error})"
        ) from error
    if not theirs:
        accelerator.state.made_by_hf_purify = True
    if instead:
        log.warning("accelerate was launched with DeepSpeed's ZeRO-3: the model is spread by FSDP2 instead, in the same shares")
    return accelerator


def take_zero3() -> bool:
    """Take a launch with DeepSpeed's ZeRO-3 as the wish to spread the model; True where it was one.

    DeepSpeed's engine takes a model with one optimizer, and a repair has several, of masks among others.

    Raises:
        ConfigError: another stage, which spreads no model.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") != "true":
        return False
    if (stage := os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")) != "3":
        raise ConfigError(
            f"accelerate was launched with DeepSpeed, stage {stage}, whose engine takes a model with one optimizer, and a repair has several: launch "
            "with recipes/accelerate/ddp.yaml, or with fsdp2.yaml to spread the model"
        )
    del os.environ["ACCELERATE_USE_DEEPSPEED"]
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
    return True


def load(recipe: Recipe) -> tuple[Adapter, Loaded]:
    """The recipe's model with its modality: one that is loaded already, a module, a new one to be trained, or a checkpoint."""
    named = [find("adapter", recipe.adapter)()] if recipe.adapter else []
    if isinstance(recipe.model, (Loaded, torch.nn.Module)):
        return load_live(recipe, named)
    name = str(recipe.model)
    if isinstance(recipe, ImplantRecipe) and recipe.create:
        adapter = creator(recipe)
        check_settings(recipe, adapter)
        return adapter, adapter.create(name, recipe.classes or 0, labels=recipe.labels, **recipe.model_options, **prompt(recipe))
    known = named or [find("adapter", n)() for n in names("adapter")]
    place = next((found for adapter in known if (found := adapter.locate(name))), name)
    pulled = hub.pull(place, recipe.revision)
    merging = isinstance(recipe, PurifyRecipe) and recipe.merge
    if (wanted := lora.read_lora(pulled.folder, name)) is None:
        if recipe.base is not None or merging:
            raise ConfigError(f"base and merge are for a LoRA, and '{name}' is a whole checkpoint: leave them (--base, --merge) out")
        adapter, loaded = load_checkpoint(recipe, known, name, pulled)
        rank = recipe.lora if isinstance(recipe, ImplantRecipe) else None
        return adapter, loaded if rank is None else lora.new_lora(loaded, rank)
    if recipe.base is None:
        raise lora.wanted_base(wanted, name)
    if getattr(recipe, "lora", None) is not None:
        raise ConfigError(f"'{name}' is a LoRA already: leave lora (--lora) out to train it on")
    source, revision = hub.split_name(recipe.base)
    base = hub.pull(next((found for a in known if (found := a.locate(source))), source), revision)
    if lora.read_lora(base.folder, source) is not None:
        raise ModelError(f"the base '{source}' is an adapter itself; name the checkpoint that it is for")
    adapter, loaded = load_checkpoint(recipe, known, source, base, pulled.folder)
    weights = snapshot(loaded.model) if merging else {}
    found, peft = lora.apply_lora(loaded, pulled.folder, wanted, name, pulled.revision)
    return adapter, merge(found, peft, weights) if merging else found


def load_live(recipe: Recipe, named: list[Adapter]) -> tuple[Adapter, Loaded]:
    """A model that is in memory already, with the modality that claims its class; a LoRA of PEFT on one stays a LoRA."""
    given = recipe.model
    if isinstance(given, Loaded):
        adapter = named[0] if named else find("adapter", "vision")()
        check_settings(recipe, adapter)
        return adapter, given
    inside = given.get_base_model() if hasattr(given, "peft_config") and hasattr(given, "get_base_model") else given
    config = inside.config.to_dict() if hasattr(inside, "config") and hasattr(inside.config, "to_dict") else {}
    known = [find("adapter", n)() for n in names("adapter")]
    claiming = [a for a in known if config and a.claims(config | {"architectures": [class_name(inside)]})]
    adapter = [*named, *claiming, find("adapter", "vision")()][0]
    check_settings(recipe, adapter)
    loaded = adapter.load(inside, processor=recipe.processor, labels=recipe.labels, **prompt(recipe))
    return adapter, loaded if inside is given else lora.of_live(loaded, given)


def load_checkpoint(
    recipe: Recipe, known: list[Adapter], name: str, pulled: hub.Pulled, beside: Path | None = None
) -> tuple[Adapter, Loaded]:
    """A checkpoint with the modality that claims it.

    Args:
        beside: folder of an adapter for it, which may have a tokenizer and records of its own.
    """
    config = hub.read_config(pulled.folder) | ({"task_type": hub.read_config(beside, lora.CONFIG).get("task_type")} if beside else {})
    adapter = next((a for a in known if a.claims(config)), known[0] if recipe.adapter else None)
    if adapter is None and (named := config.get("architectures")):
        kinds = " and ".join(f"{a.task} ({a.name})" for a in known)
        raise ModelError(f"'{name}' is of no kind that can be repaired: its config names {', '.join(named)}; there is {kinds}")
    adapter = adapter or find("adapter", "vision")()
    check_settings(recipe, adapter)
    return adapter, adapter.load(pulled.folder, name=name, revision=pulled.revision, beside=beside, **prompt(recipe))


def check_settings(recipe: Recipe, adapter: Adapter) -> None:
    """Raises ConfigError where a setting is given that other modalities have and this one has not."""
    owners = {n: find("adapter", n).settings for n in names("adapter")}
    for name in dict.fromkeys(s for settings in owners.values() for s in settings):
        if getattr(recipe, name, None) not in (None, False) and name not in adapter.settings:
            *first, last = [n for n, settings in owners.items() if name in settings]
            theirs = f"{', '.join(first)} and {last}" if first else last
            raise ConfigError(f"the setting '{name}' is for models of {theirs}; this is one of {adapter.name}")


def prompt(recipe: Recipe) -> dict[str, Any]:
    """What the recipe says of how a model is fed, as far as it does."""
    return {k: v for k in ("template", "max_length", "cut") if (v := getattr(recipe, k)) is not None}


def creator(recipe: ImplantRecipe) -> Adapter:
    """The modality that makes the new model of a recipe: the one that is named, else the first that knows the architecture."""
    if recipe.adapter:
        return find("adapter", recipe.adapter)()
    known = [find("adapter", n)() for n in names("adapter")]
    return next((a for a in known if a.creates(str(recipe.model))), find("adapter", "vision")())
