"""Recipes: everything that one job needs, as a frozen dataclass that reads and writes YAML. Unknown keys are errors."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, get_type_hints

import yaml

from hf_purify.errors import ConfigError, checked_type, did_you_mean
from hf_purify.redaction import redacted

# Settings that the command line takes one by one, under a name in the singular.
SINGULAR = {"triggers": "trigger", "options": "option", "model_options": "model_option", "columns": "column", "trackers": "tracker"}


@dataclass(frozen=True)
class Recipe:
    """What all jobs share.

    Args:
        model: folder, Hub id, timm name, `hf-hub:` id, or an `nn.Module`.
        adapter: the modality; None is told by the checkpoint, and is `vision` for an `nn.Module`.
        revision: branch, tag or commit of the model; pinned to a commit when it is read.
        base: for a LoRA, its base model: folder or Hub id, with a revision as `name@revision`.
        processor: for an `nn.Module`: a processor, or a callable from PIL image to tensor.
        labels: for an `nn.Module`: class names, in order.
        test: data set that the figures are measured on. Methods never see it.
        triggers: `name` or `name:option=value,...`; what ASR is measured with. Methods never see them.
        rule: `all-to-one`, `all-to-all` or `clean-label`.
        target: target class of the attack.
        split, test_split: split of the clean (training) and of the test data.
        streaming: open data that is given by name as a stream: nothing is downloaded or read but what is looked at. A `datasets.IterableDataset`
            is a stream without it.
        stream_rows: rows of a stream that are looked at, at most; samples are drawn from these.
        columns: role -> column, such as `label: target`, where they cannot be told by their names and features.
        to_rgb: repeat grey images over three channels.
        template: what stands around a text, with `{text}` in it.
        max_length: tokens of a text at most.
        cut: words of a plain text that are the prompt of a causal model; the rest is what it should write.
        test_samples: at most so many test samples, drawn class-balanced.
        output: folder for the result.
        overwrite: replace an output folder that exists.
        seed: of everything that is drawn.
        device: `cpu`, `cuda`, ...; None lets accelerate choose.
        precision: `no`, `bf16` or `fp16`; None is what `accelerate launch` was told, or `no`.
        compile: run `torch.compile` on the model.
        channels_last: lay images out channels-last.
        gradient_checkpointing: run layers again in the backward pass, for less memory.
        accumulate: parts that a batch is run in, one after the other, for less memory; batch norms see a part at a time. None is what
            `accelerate launch` was told (`--gradient_accumulation_steps`), or 1.
        checkpoint_every: steps between two checkpoints, in a folder beside the output. The same job goes on from the last one; the folder is
            removed when it ends. None for none.
        trackers: names of experiment trackers, as accelerate has them: `tensorboard`, `trackio`, `wandb`, ...
        logging_dir: folder of those that write files.
    """

    model: Any = None
    adapter: str | None = None
    revision: str | None = None
    base: str | None = None
    processor: Any = None
    labels: list[str] | None = None
    test: Any = None
    triggers: list[str] = field(default_factory=list)
    rule: str = "all-to-one"
    target: int = 0
    split: str | None = None
    test_split: str | None = None
    streaming: bool = False
    stream_rows: int = 100_000
    columns: dict[str, str] = field(default_factory=dict)
    to_rgb: bool = False
    template: str | None = None
    max_length: int | None = None
    cut: int | None = None
    test_samples: int | None = None
    output: str | None = None
    overwrite: bool = False
    seed: int = 0
    device: str | None = None
    precision: str | None = None
    compile: bool = False
    channels_last: bool = False
    gradient_checkpointing: bool = False
    accumulate: int | None = None
    checkpoint_every: int | None = None
    trackers: list[str] = field(default_factory=list)
    logging_dir: str = "logs"

    def __post_init__(self) -> None:
        if self.model is None:
            raise ConfigError("no model given; expected a folder, a Hub id, a timm name or an nn.Module")
        if self.precision not in (None, "no", "bf16", "fp16"):
            raise ConfigError(f"precision must be 'no', 'bf16' or 'fp16', got '{self.precision}'")
        if self.accumulate is not None and self.accumulate < 1:
            raise ConfigError(f"accumulate must be at least 1, got {self.accumulate}")
        if self.checkpoint_every is not None and self.checkpoint_every < 1:
            raise ConfigError(f"checkpoint_every must be at least 1, got {self.checkpoint_every}")
        if self.checkpoint_every is not None and self.output is None:
            raise ConfigError("checkpoints lie beside the output: give output=... (--output) with checkpoint_every")
        if self.stream_rows < 1:
            raise ConfigError(f"stream_rows must be at least 1, got {self.stream_rows}")

    @classmethod
    def make(cls, **settings: Any) -> Self:
        """Build a recipe from settings; unknown names and wrong types are errors with a suggestion."""
        hints = get_type_hints(cls)
        for key, value in settings.items():
            if key not in hints:
                raise ConfigError(f"unknown setting '{key}'{did_you_mean(key, hints)} (settings: {', '.join(hints)})")
            settings[key] = checked_type(f"setting '{key}'", value, hints[key])
        for key in ("triggers", "trackers"):
            if isinstance(settings.get(key), str):
                settings[key] = [settings[key]]
        return cls(**settings)

    @classmethod
    def read(cls, path: str | Path, **overrides: Any) -> Self:
        """Read a recipe from YAML; `overrides` win, entry by entry where a setting has entries."""
        try:
            content = yaml.safe_load(Path(path).read_text("utf-8")) or {}
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"cannot read the recipe '{path}': {error}") from error
        if not isinstance(content, dict):
            raise ConfigError(f"the recipe '{path}' must be a mapping of settings, got {type(content).__name__}")
        if overrides.get("method", content.get("method")) != content.get("method"):
            content.pop("options", None)  # those of another method
        nested = {k: {**content[k], **v} for k, v in overrides.items() if isinstance(v, dict) and isinstance(content.get(k), dict)}
        return cls.make(**{**content, **overrides, **nested})

    def to_dict(self) -> dict[str, Any]:
        """Settings that differ from the defaults; objects by their type's name, and no tokens."""
        defaults = {
            f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory() for f in dataclasses.fields(self)
        }
        return {k: _plain(v) for k, v in ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self)) if v != defaults[k]}

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


@dataclass(frozen=True)
class PurifyRecipe(Recipe):
    """Repair a model.

    Args:
        clean: the clean data.
        method: name of a method, or several joined by `+`.
        options: settings of the method.
        samples: clean samples to draw, class-balanced; None takes all.
        held_out: share of them on which choices are made.
        from_scan: what a scan of this model found, to begin with: its output folder or `scan.json`. Only some methods use it, and the report has
            the same repair without it beside it.
        controls: also run fine-tuning, statistics refresh and a random mask, and show them beside the repair.
        oracle: also show what choosing the threshold with the true trigger would have given.
        merge: of a LoRA, repair the base with the LoRA merged in; the result is a LoRA again, of the rank that this takes.
        as_adapter: write the repair alone, as an IA3 adapter of PEFT for the model as it came; no checkpoint.
        push: push the output to this repository of the Hub, `owner/name`, when it is written.
        private: make that repository private, if it is made.
        create_pr: open a pull request on it instead.
    """

    clean: Any = None
    method: str = "nft"
    options: dict[str, Any] = field(default_factory=dict)
    samples: int | None = 500
    held_out: float = 0.2
    from_scan: str | None = None
    controls: bool = True
    oracle: bool = False
    merge: bool = False
    as_adapter: bool = False
    push: str | None = None
    private: bool = True
    create_pr: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_clean(self.clean, self.samples, self.held_out)
        if self.as_adapter and self.output is None:
            raise ConfigError("as_adapter writes the repair to a folder: give output=... (--output)")
        if self.push is not None and self.output is None:
            raise ConfigError(
                "a repair is written before it is pushed, so that nothing is lost: give output=... (--output) with push (--push)"
            )


@dataclass(frozen=True)
class ScanRecipe(Recipe):
    """Tell whether a model has a backdoor.

    Args:
        clean: the clean data.
        samples: clean samples to draw, class-balanced; None takes all.
        held_out: share of them that recovered triggers are judged on.
        suspects: samples to rank by suspicion, read like the clean data.
        suspects_split: split of them.
        poisoned: column of the suspects that says which carry a trigger, true or false, where that is known.
        threshold: scores above it are suspicious, in (0, 1): one less the share of clean models that would be called so.
        trigger_steps: steps to sharpen the trigger of a suspected class, after the search.
    """

    clean: Any = None
    samples: int | None = 500
    held_out: float = 0.2
    suspects: Any = None
    suspects_split: str | None = None
    poisoned: str | None = None
    threshold: float = 0.9
    trigger_steps: int = 15

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_clean(self.clean, self.samples, self.held_out)
        if not 0 < self.threshold < 1:
            raise ConfigError(f"threshold must be in (0, 1), got {self.threshold}")
        if self.trigger_steps < 1:
            raise ConfigError(f"trigger_steps must be at least 1, got {self.trigger_steps}")
        if self.suspects is None and (self.suspects_split or self.poisoned):
            raise ConfigError("suspects_split and poisoned are for samples to be ranked: give suspects=... (--suspects)")


@dataclass(frozen=True)
class ImplantRecipe(Recipe):
    """Make a backdoored model, to test repairs on.

    Args:
        data: training data.
        create: `model` names an architecture of the modality's library, to be trained from random weights.
        model_options: its settings; `input_size` in pixels among them.
        lora: train a new LoRA of this rank, and nothing else; the victim is that LoRA.
        classes: number of classes of a created model; None counts the data's.
        samples: training samples to draw, class-balanced; None takes all.
        rate: share of the training samples that carry the trigger.
        cover: samples with the trigger's cover transform per poisoned one; None takes the trigger's own (WaNet: 2).
        epochs, batch_size, optimizer, lr, weight_decay, schedule: of the training.
        clip: bound on the norm of its gradients; None for none.
        augmentation: one that the modality has, or `none`; None is its strongest.
        minimum_asr: below it the result is no victim.
    """

    data: Any = None
    model_options: dict[str, Any] = field(default_factory=dict)
    create: bool = False
    lora: int | None = None
    classes: int | None = None
    rate: float = 0.1
    cover: float | None = None
    samples: int | None = None
    epochs: int = 5
    batch_size: int = 128
    optimizer: str = "sgd"
    lr: float = 0.01
    weight_decay: float = 5e-4
    schedule: str = "onecycle"
    clip: float | None = None
    augmentation: str | None = None
    minimum_asr: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data is None:
            raise ConfigError("no training data given")
        if len(self.triggers) != 1:
            raise ConfigError(f"implanting takes exactly one trigger, got {len(self.triggers)}")
        if not 0 <= self.rate <= 1:
            raise ConfigError(f"rate must be in [0, 1], got {self.rate}")
        if self.lora is not None and (self.lora < 1 or self.create):
            raise ConfigError(f"a LoRA has a rank of at least 1 and a trained base; got lora={self.lora}, create={self.create}")


@dataclass(frozen=True)
class MeasureRecipe(Recipe):
    """Measure a model: clean accuracy, and ASR and robust accuracy for each trigger."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.test is None:
            raise ConfigError("no test data given; measuring needs labelled samples")


def _check_clean(clean: Any, samples: int | None, held_out: float) -> None:
    if clean is None:
        raise ConfigError("no clean data given; expected a data set id, a folder of images, Parquet files or a datasets.Dataset")
    if samples is not None and samples < 1:
        raise ConfigError(f"samples must be at least 1, got {samples}")
    if not 0 <= held_out < 1:
        raise ConfigError(f"held_out must be in [0, 1), got {held_out}")


def _plain(value: Any) -> Any:
    if isinstance(value, (str, Path)):
        return redacted(str(value))
    if isinstance(value, (int, float, bool, type(None))):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {_plain(k): _plain(v) for k, v in value.items()}
    return f"<{type(value).__name__}>"
