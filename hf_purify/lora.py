"""A LoRA of PEFT as what is repaired: its units are the neurons, its weights alone move, and the result is a LoRA again.

Unit `i` of a LoRA of rank `r` is row `i` of `A` and column `i` of `B`, a hidden unit between two linear layers. The base is not merged:
it stays as it is, bit for bit.
"""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_purify.adapter import Loaded
from hf_purify.errors import ModelError, UnsafeCheckpoint, first_line, shown
from hf_purify.headers import read_header
from hf_purify.hub import ALLOWED, pickle_error, read_config
from hf_purify.neurons import NeuronIndex
from hf_purify.task import movable

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LIBRARIES = ("transformers", "timm", "torch", "torchvision")  # whose models an adapter may name as its base
TASKS = {"text-classification": "SEQ_CLS", "text-generation": "CAUSAL_LM", "text2text-generation": "SEQ_2_SEQ_LM"}
# Settings that change which units there are and how they are scaled, or nothing at all. Any other must be as it is by default.
KNOWN = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("r", "lora_alpha", "lora_dropout", "fan_in_fan_out", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"),
    *("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"),
}


def read_lora(folder: Path, source: str) -> dict[str, Any] | None:
    """What `adapter_config.json` of a pulled folder says, or None where there is none.

    Raises:
        UnsafeCheckpoint: pickled weights, or a base with code of its own.
        ModelError: no LoRA, one with settings that are not known, or a whole checkpoint lies beside it.
    """
    if not (folder / CONFIG).is_file():
        return None
    config = read_config(folder, CONFIG)
    if any(folder.glob("model*.safetensors")):
        raise ModelError(f"'{source}' holds a checkpoint and an adapter, which transformers would apply to it: keep each in its own folder")
    if not (folder / WEIGHTS).is_file():
        pickled = [p.name for p in folder.glob("adapter_model.*")]
        raise pickle_error(source, pickled) if pickled else ModelError(f"'{source}' has an {CONFIG} and no {WEIGHTS}")
    mapping = config.get("auto_mapping") or {}
    library = str(mapping.get("parent_library") or "torch") if isinstance(mapping, dict) else str(mapping)
    if library.partition(".")[0] not in LIBRARIES:
        raise UnsafeCheckpoint(f"the adapter '{source}' is for a model with code of its own ('{library}'); hf-purify never runs such code")
    if str(config.get("peft_type")) != "LORA":
        raise ModelError(
            f"'{source}' is an adapter of type {config.get('peft_type')}; only LoRAs are repaired by themselves: merge it into its base, and "
            "repair the merged model"
        )
    _check_rank(config, folder / WEIGHTS, source)
    return config


def _check_rank(config: Mapping[str, Any], weights: Path, source: str) -> None:
    """Refuse a rank that no stored tensor has, before units are made for it."""
    patterns = config.get("rank_pattern")
    ranks = [config.get("r", 8), *(patterns.values() if isinstance(patterns, dict) else ())]
    longest = max((side for t in read_header(weights).tensors.values() for side in t.shape), default=0)
    wrong = next((r for r in ranks if not isinstance(r, int) or not 1 <= r <= longest), None)
    if wrong is not None:
        raise ModelError(f"the LoRA '{source}' says that its rank is {shown(wrong)}; the longest side of its tensors is {longest}")


def wanted_base(config: Mapping[str, Any], source: str) -> ModelError:
    """The error for an adapter whose base was not named: a second model is loaded only when one is asked for."""
    base, revision = config.get("base_model_name_or_path") or "BASE", config.get("revision")
    name = f"{base}@{revision}" if revision else base
    return ModelError(f"'{source}' is an adapter for '{name}', which is loaded only if you name it: base='{name}' (--base {name})")


def apply_lora(base: Loaded, folder: Path, config: Mapping[str, Any], source: str, revision: str | None) -> tuple[Loaded, Any]:
    """A base with a stored LoRA in it, to be repaired and saved as one, and PEFT's wrapper around it.

    Raises:
        ModelError: the two do not fit, or the LoRA is of a kind that is not known.
    """
    from peft import LoraConfig, set_peft_model_state_dict

    defaults = LoraConfig().to_dict()
    strange = [k for k, v in config.items() if k not in KNOWN and v and v != defaults.get(k)]
    if strange or str(config.get("init_lora_weights")) not in ("True", "False", "None", "gaussian", "orthogonal"):
        what = strange[0] if strange else "init_lora_weights"
        raise ModelError(
            f"the LoRA '{source}' sets {what}={config[what]!r}, which a repair could not keep: convert it to a plain LoRA first"
        )
    try:
        state = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ModelError(f"'{source}': {WEIGHTS} cannot be read as safetensors: {error}") from error
    bad = next((k for k, v in state.items() if not v.is_floating_point() or not torch.isfinite(v).all()), None)
    if bad:
        raise ModelError(f"the adapter '{source}' holds NaN, infinite or integer values in '{bad}'; it cannot be repaired")
    misfit = f"the adapter '{source}' does not fit the base '{base.source}'"
    try:
        peft = insert(base.model, LoraConfig(**{k: v for k, v in config.items() if k in KNOWN and k != "peft_type"}))
        done: Any = set_peft_model_state_dict(peft, state)
    except (ValueError, RuntimeError, TypeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise ModelError(f"{misfit}: {lines[min(1, len(lines) - 1)]}") from error
    except KeyError as error:
        raise ModelError(f"{misfit}: the adapter lacks {error}") from error
    missing = [k for k in done.missing_keys if k.removeprefix("base_model.model.") in movable(base.model)]
    if missing or done.unexpected_keys:
        what, some = ("lacks", missing) if missing else ("has besides", done.unexpected_keys)
        raise ModelError(f"{misfit}: the adapter {what} {len(some)} tensors, such as {some[0]}")
    return _loaded(base, peft, source, revision, folder, {k: v.dtype for k, v in state.items()}), peft


def new_lora(base: Loaded, rank: int) -> Loaded:
    """A base with a new LoRA in all linear layers but the output layer; a classifier's head belongs to it too.

    Raises:
        ModelError: the model is none of transformers.
    """
    from peft import LoraConfig
    from transformers import PreTrainedModel

    if not isinstance(base.model, PreTrainedModel):
        raise ModelError(f"no new LoRA for '{base.source}': which layers it goes into is known for models of transformers alone")

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type=TASKS.get(base.task))
    try:
        peft = insert(base.model, config)
    except ValueError as error:
        raise ModelError(f"no LoRA for '{base.source}': {first_line(error)}") from error
    config.base_model_name_or_path, config.revision, config.inference_mode = base.source, base.revision, True
    return _loaded(base, peft, f"a LoRA of rank {rank} on {base.source}", None, None, {})


def of_live(base: Loaded, peft: Any) -> Loaded:
    """A model that is in memory already with a LoRA of PEFT in it, to be repaired and saved as one.

    Raises:
        ModelError: the adapter is no LoRA, or there are several.
    """
    kinds = {name: str(getattr(config.peft_type, "value", config.peft_type)) for name, config in peft.peft_config.items()}
    if list(kinds.values()) != ["LORA"] or list(kinds) != ["default"]:
        listed = ", ".join(f"{name}: {kind}" for name, kind in kinds.items())
        raise ModelError(f"expected a model with one LoRA named 'default', got {listed}: merge what it has, and repair the merged model")
    return _loaded(base, peft, f"a LoRA on {base.source}", None, None, {})


def has_lora(model: nn.Module) -> bool:
    """Is there an unmerged LoRA in a model?"""
    return any(".lora_" in n for n, _ in model.named_parameters())


def units(index: NeuronIndex, model: nn.Module) -> NeuronIndex:
    """The neurons that belong to the LoRA in a model, with all that they own; all of them where it was merged."""
    own = movable(model)
    if not has_lora(model):
        return index
    return NeuronIndex(tuple(g for g in index if all(p.param in own for p in g.params)), index.keys)


def check_base(model: nn.Module, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    """Raises ModelError where a repair changed the base of a LoRA, as new statistics of its norms do: an adapter cannot keep that."""
    own = movable(model)
    if not has_lora(model):
        return
    moved = [n for n, v in after.items() if n not in own and not torch.equal(v, before[n])]
    if moved:
        raise ModelError(
            f"the repair changed {len(moved)} tensors of the base, such as '{moved[0]}', which no adapter keeps: take another method"
        )


def insert(model: nn.Module, config: Any) -> Any:
    """PEFT's wrapper around a model; the model itself now holds the LoRA, and is used without the wrapper."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the base has another name here, and that it is Conv1D
        peft = get_peft_model(model, config)
    peft.eval()
    return peft


def save_lora(peft: Any, out: Path, dtypes: Mapping[str, torch.dtype]) -> None:
    """Write the weights of a LoRA, in the dtypes that they had."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(peft, save_embedding_layers=False)
    tensors = {k: v.detach().to("cpu", dtypes.get(k, v.dtype)).contiguous() for k, v in state.items()}
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})


def copy_beside(folder: Path, out: Path) -> None:
    """Copy what lies beside a LoRA's weights: its config, a tokenizer, records."""
    for file in folder.iterdir():
        if any(fnmatch(file.name, p) for p in ALLOWED) and not file.name.endswith((".safetensors", "README.md")):
            shutil.copyfile(file, out / file.name)


def _loaded(base: Loaded, peft: Any, source: str, revision: str | None, folder: Path | None, dtypes: Mapping[str, torch.dtype]) -> Loaded:
    """The base's model, which holds the LoRA, with what saves the LoRA alone."""
    from peft import get_peft_model_state_dict

    marks = {n: torch.full((1,), i) for i, n in enumerate(peft.state_dict())}
    names = [n.removeprefix("base_model.model.") for n in marks]
    saved = get_peft_model_state_dict(peft, state_dict=marks, save_embedding_layers=False)

    def save(_: nn.Module, out: Path) -> None:
        save_lora(peft, out, dtypes)
        if folder is not None:
            copy_beside(folder, out)
        else:
            config = peft.peft_config["default"]
            config.save_pretrained(str(out), auto_mapping_dict=None if config.task_type else origin)

    origin = {"base_model_class": type(base.model).__name__, "parent_library": type(base.model).__module__}
    keys = {names[int(mark)]: key for key, mark in saved.items()}
    pinned = f"{base.source}@{base.revision}" if base.revision else base.source
    return dataclasses.replace(base, source=source, revision=revision, folder=folder, keys=keys, saver=save, base=pinned)
