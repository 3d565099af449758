"""Checkpoint folders of transformers: read, checked, and saved with what lies beside the weights. Shared by the modalities."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.state import AcceleratorState
from safetensors import SafetensorError, safe_open
from torch import nn

from hf_purify.adapter import Loaded, spread_over
from hf_purify.errors import ModelError, PurifyError, did_you_mean, first_line
from hf_purify.room import bounded

COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*")
PAPERS = ("report.json", "provenance.json")  # of an earlier repair
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".index.json")


def read_config(folder: Path) -> dict[str, Any]:
    """The checkpoint's `config.json`.

    Raises:
        ModelError: it is missing or no JSON object.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(f"no config.json in '{folder}'; expected a transformers or timm checkpoint")
    try:
        config = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ModelError(f"'{file}' is no valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"'{file}' must hold a JSON object, got {type(config).__name__}")
    return config


def read_records(folder: Path) -> dict[str, Any]:
    """What hf-purify wrote beside the config of an adapter; empty where it wrote nothing."""
    try:
        records = json.loads((folder / "hf_purify.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return records if isinstance(records, dict) else {}


class Head(NamedTuple):
    """The head of a classifier that an adapter brings along: the names of its modules, and the number of classes."""

    modules: tuple[str, ...]
    classes: int


def read_head(folder: Path) -> Head | None:
    """The head that the adapter in a folder brings along; None where it uses the base's."""
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    modules = tuple(config.get("modules_to_save") or ())
    if config.get("task_type") != "SEQ_CLS" or not modules:
        return None
    try:
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            keys = [k for k in file.keys() if _inside(k, modules)]  # noqa: SIM118 - not a mapping
            shapes = [shape for k in keys if len(shape := file.get_slice(k).get_shape()) == 2]
    except SafetensorError as error:
        raise ModelError(f"'{folder}': adapter_model.safetensors cannot be read as safetensors: {error}") from error
    return Head(modules, min(s[0] for s in shapes)) if shapes else None


def _inside(key: str, modules: tuple[str, ...]) -> bool:
    """Is a tensor part of one of these modules, which are named by the endings of their names?"""
    return any(f".{m}." in f".{key}" for m in modules)


def load_model(folder: Path, source: str, auto: Any, what: str, head: Head | None = None) -> nn.Module:
    """Load a model by one of transformers' `AutoModelFor...` classes: safetensors only, no remote code, every weight from the file.

    Args:
        what: what the model must be, such as `image classifier`, for messages.
        head: one that an adapter will put in the place of the checkpoint's, which may have none.

    Raises:
        ModelError: another kind of model, quantized, or weights that cannot be read or do not fit.
    """
    from transformers import AutoConfig

    try:
        parsed = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each type checks its settings in its own way
        raise ModelError(f"'{source}' cannot be read as a transformers model: {first_line(error)}") from error
    if type(parsed) not in auto._model_mapping:
        raise ModelError(f"'{source}' is no {what}: transformers has none for models of type '{parsed.model_type}'")
    check_config(parsed, source)
    if head and parsed.num_labels != head.classes:
        parsed.num_labels = head.classes
    options: dict[str, Any] = {
        "use_safetensors": True,
        "trust_remote_code": False,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
    }
    processes = spread_over()
    try:
        if processes > 1:
            with bounded(folder, source, spread=True):
                options["distributed_config"] = fsdp_config(parsed, auto, source, processes)
        with bounded(folder, source, spread=processes > 1):
            model, info = auto.from_pretrained(folder, config=parsed, **options)
    except PurifyError:
        raise
    except Exception as error:  # as above, and what reading a file can raise
        raise ModelError(f"the weights of '{source}' cannot be read: {first_line(error)}") from error
    brought = head.modules if head else ()
    missing, mismatched = (
        [k for k in info.get(kind) or () if not _inside(k if isinstance(k, str) else k[0], brought)]
        for kind in ("missing_keys", "mismatched_keys")
    )
    check_loaded(missing, mismatched, source)
    return model.eval()


def fsdp_config(config: Any, auto: Any, source: str, processes: int) -> Any:
    """How transformers spreads a model over processes as it loads it: layer by layer (FSDP2), so that none holds it whole.

    Raises:
        ModelError: it has no layers to be gathered one after the other, or this version of transformers cannot.
    """
    try:
        from transformers.distributed import DistributedConfig
    except ImportError as error:
        raise ModelError("this version of transformers cannot load a model that is spread over processes (FSDP): update it") from error
    from transformers.modeling_layers import GradientCheckpointingLayer

    with torch.device("meta"):
        bare = auto.from_config(config)
    layers = [re.sub(r"\.\d+(?=\.|$)", ".*", n) for n, m in bare.named_modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(f"'{source}' has no layers that can be spread over processes (FSDP): launch without it")
    # autocast would keep a copy of each layer
    halved = bool(AcceleratorState._shared_state) and AcceleratorState().mixed_precision == "bf16"
    return DistributedConfig(fsdp_size=processes, fsdp_plan=dict.fromkeys(layers, "free_full_weight"), fsdp_mixed_precision=halved)


def blank_model(config: Mapping[str, Any], source: str, auto: Any, what: str) -> nn.Module:
    """The model that a `config.json` describes, in eval mode, with random weights; on the meta device with none.

    Raises:
        ModelError: transformers has no such model, it is quantized, or its settings do not go together.
    """
    from transformers import CONFIG_MAPPING

    kind = str(config.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise ModelError(
            f"transformers has no models of type '{kind}', which the config of '{source}' names{did_you_mean(kind, CONFIG_MAPPING)}"
        )
    try:
        parsed = CONFIG_MAPPING[kind].from_dict(dict(config))
        if type(parsed) not in auto._model_mapping:
            raise ModelError(f"'{source}' is no {what}: transformers has none for models of type '{kind}'")
        check_config(parsed, source)
        return auto.from_config(parsed).eval()
    except ModelError:
        raise
    except Exception as error:  # each type checks its settings in its own way
        raise ModelError(f"no {what} can be made of the config of '{source}': {first_line(error)}") from error


def stored_dtype(model: nn.Module) -> torch.dtype:
    """What a config of transformers says of its checkpoint's weights; float32 where it says nothing."""
    found = getattr(getattr(model, "config", None), "dtype", None)
    found = getattr(torch, found, None) if isinstance(found, str) else found
    return found if isinstance(found, torch.dtype) else torch.float32


def check_config(config: Any, source: str) -> None:
    """Raises ModelError where a config says that the weights are quantized."""
    if getattr(config, "quantization_config", None):
        raise ModelError(f"the weights of '{source}' are quantized; a repair needs floating-point weights: load the unquantized checkpoint")


def check_loaded(missing: Any, mismatched: Any, source: str) -> None:
    """Refuse a checkpoint that would leave parts of the model at random values."""
    if missing or mismatched:
        first = [str(k) for k in (missing or mismatched)][:3]
        what = "lacks" if missing else "has other shapes for"
        raise ModelError(
            f"the checkpoint '{source}' {what} {len(missing or mismatched)} of the model's tensors, such as {', '.join(first)}; it would run on random weights"
        )


class Made(NamedTuple):
    """What a modality loads its checkpoints by.

    Args:
        what: a model of it in words, such as `image classifier`.
        kind: what the names of its architectures hold, such as `ForImageClassification`.
        model, processor: the Auto classes of transformers.
        feeder: the processor in words, with its file.
    """

    what: str
    kind: str
    model: Any
    processor: Any
    feeder: str = "image processor (preprocessor_config.json)"


def load_transformers(folder: Path, source: str, revision: str | None, made: Made) -> Loaded:
    """A checkpoint of transformers with its processor.

    Raises:
        ModelError: of another kind, without a processor, or as `load_model` says.
    """
    config = read_config(folder)
    architectures = config.get("architectures") or []
    if architectures and not any(made.kind in a for a in architectures):
        raise ModelError(f"'{source}' is no {made.what}: its config names {', '.join(architectures)}; expected one {made.kind}")
    model = load_model(folder, source, made.model, made.what)
    try:
        processor = made.processor.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"'{source}' has no {made.feeder}: {first_line(error)}") from error
    labels = class_labels(model.config)
    return Loaded(model, processor, labels, source, "transformers", revision, folder, transformers_keys(model), saver(folder))


def class_labels(config: Any) -> list[str]:
    """Names of the classes that a config of transformers holds, in order."""
    return [config.id2label[i] for i in sorted(config.id2label)] if config.id2label else []


def transformers_keys(model: nn.Module) -> dict[str, str]:
    """Parameter name -> key under which `save_pretrained` writes it, where the two differ.

    The mapping is read off a renaming of index tensors; where several parameters are fused on saving there is none.
    """
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers < 5.? writes module names
        return {}
    names = list(model.state_dict())
    marks = {n: torch.full((1,), i) for i, n in enumerate(names)}
    try:
        saved = revert_weight_conversion(model, dict(marks))  # type: ignore[arg-type]
        return {names[int(mark)]: key for key, mark in saved.items() if mark.numel() == 1 and names[int(mark)] != key}
    except (RuntimeError, ValueError, IndexError):
        return {}


def saver(folder: Path) -> Callable[[nn.Module, Path], None]:
    """What saves a model as transformers does, with the files that lie beside its weights in `folder`."""

    def save(model: nn.Module, out: Path) -> None:
        model.save_pretrained(out)  # type: ignore[operator]
        copy_companions(folder, out)

    return save


def of_live(model: Any, processor: Any, labels: list[str] | None = None) -> Loaded:
    """A model of transformers that is in memory already, such as a `Trainer`'s, with its processor."""
    check_config(model.config, type(model).__name__)

    def save(model: Any, out: Path) -> None:
        model.save_pretrained(out)
        if hasattr(processor, "save_pretrained"):
            processor.save_pretrained(out)

    source = model.config.name_or_path or type(model).__name__
    return Loaded(
        model, processor, list(labels or class_labels(model.config)), source, "transformers", keys=transformers_keys(model), saver=save
    )


def copy_companions(source: Path, out: Path) -> None:
    """Copy what lies beside the weights (processor, tokenizer, label files, licence), byte for byte, except what the output has already.

    `generation_config.json` is the one file that transformers would write anew. Programs are never carried over.
    """
    for file in source.iterdir():
        carried = any(fnmatch(file.name, p) for p in COMPANIONS) and not file.name.endswith(WEIGHT_FILES) and file.name not in PAPERS
        if file.is_file() and carried and (file.name == "generation_config.json" or not (out / file.name).exists()):
            shutil.copyfile(file, out / file.name)


def check_weights(model: nn.Module) -> None:
    """Refuse quantized weights and weights that are not finite.

    Raises:
        ModelError: names the first such tensor.
    """
    if getattr(model, "is_quantized", False) or getattr(getattr(model, "config", None), "quantization_config", None):
        raise ModelError("the model's weights are quantized; a repair needs floating-point weights: load the unquantized checkpoint")
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ModelError(f"the checkpoint holds NaN or infinite values in '{name}'; it cannot be repaired")
        if not tensor.is_floating_point() and tensor.dim() >= 2 and name.endswith("weight"):
            raise ModelError(f"'{name}' has type {tensor.dtype}; expected floating-point weights (is the checkpoint quantized?)")
