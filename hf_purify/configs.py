"""JSON configs that a stranger wrote: read strictly, and refused where they ask for code, other repositories or other files.

What is only odd passes: texts that nobody opens, keys that no library knows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hf_purify.errors import ModelError, UnsafeCheckpoint, did_you_mean, shown
from hf_purify.filenames import check_name
from hf_purify.limits import UNSIZED, check_sizes
from hf_purify.plain import unique_keys

CONFIGS = (
    *("config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "generation_config.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "adapter_config.json", "hf_purify.json"),
)
LARGEST_CONFIG = 16 * 2**20  # bytes
DEEPEST = 32  # levels of lists and mappings
# Their keys are labels, tokens and tensors, which a stranger may call anything.
VOCABULARIES = {"id2label", "label2id", "weight_map", "vocab", "added_tokens_encoder"}
OURS = "hf_purify"  # begins the keys of records that hf-purify itself wrote, and alone reads
# Files that libraries open under the name which a config gives; of a tokenizer, a processor or an adapter all keys that end in `_file`.
FILES = {"transformers_weights", "source_spm", "target_spm", "vocab", "fast_tokenizer_files"}
FIXED = {"special_tokens_map_file", "added_tokens_file", "tokenizer_config_file"}  # where a tokenizer lay once; read by fixed names
FETCHED = {"url", "image", "images", "image_url", "video", "video_url", "audio", "audio_url", *FILES}
ADDRESS = re.compile(r"\s*(?:https?|ftp|file|data|s3|gs|hf)\s*:", re.IGNORECASE)
# What `timm.create_model` would fetch or open, among the arguments that a config hands to it.
TIMM_ARGUMENTS = {"model_args", "backbone_kwargs"}
TIMM_SOURCES = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}


class Found(NamedTuple):
    """A value inside a config, with the keys that lead to it; a place in a list has the key of the list."""

    keys: tuple[str, ...]
    value: Any

    @property
    def key(self) -> str:
        return self.keys[-1]

    @property
    def path(self) -> str:
        return ".".join(k if k.isidentifier() and len(k) < 80 else shown(k) for k in self.keys)


def read_json(file: Path, source: str, largest: int = LARGEST_CONFIG) -> dict[str, Any]:
    """What a JSON file holds; NaN and Infinity are numbers in it, as Python writes them.

    Raises:
        ModelError: it cannot be read, or is no JSON object.
        UnsafeCheckpoint: larger, or deeper, than any config, or a key twice, of which readers take one or the other.
    """
    name = file.name

    def repeated(key: str) -> UnsafeCheckpoint:
        return UnsafeCheckpoint(f"'{name}' of '{source}' has the key {shown(key)} twice; which one counts depends on who reads it")

    try:
        if (size := file.stat().st_size) > largest:
            raise UnsafeCheckpoint(f"'{name}' of '{source}' has {size} bytes; expected at most {largest}")
        content = json.loads(file.read_bytes().decode("utf-8"), object_pairs_hook=unique_keys(repeated))
    except RecursionError as error:
        raise UnsafeCheckpoint(f"'{name}' of '{source}' is nested more than {DEEPEST} levels deep") from error
    except ValueError as error:
        raise ModelError(f"'{name}' of '{source}' is no valid JSON: {error}") from error
    except OSError as error:
        raise ModelError(f"'{name}' of '{source}' cannot be read: {error.strerror or error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"'{name}' of '{source}' must hold a JSON object, got {type(content).__name__}")
    if _is_deeper(content, DEEPEST):
        raise UnsafeCheckpoint(f"'{name}' of '{source}' is nested more than {DEEPEST} levels deep")
    return content


def _is_deeper(content: Any, levels: int) -> bool:
    """Is something nested more than this many levels deep?"""
    level = [content]
    for _ in range(levels):
        level = [v for c in level for v in (c.values() if isinstance(c, dict) else c) if isinstance(v, (dict, list))]
    return bool(level)


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """What the config of a pulled checkpoint says; empty where there is none or it is no JSON object."""
    try:
        config = json.loads((folder / name).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def safe_config(file: Path, source: str) -> dict[str, Any]:
    """What a config says.

    Raises:
        ModelError: it is no JSON object, or has sizes that no model has.
        UnsafeCheckpoint: it asks for code of its own, for another repository, or for files outside the checkpoint.
    """
    config, name = read_json(file, source), file.name
    for found in _walk(config):
        _check_code(found, name, source)
        if not any(k.startswith(OURS) for k in found.keys):
            _check_sources(found, name, source, file.parent)
    _check_parts(config, name, source)
    check_sizes(config, name, source)
    return config


def _walk(value: Any, keys: tuple[str, ...] = ()) -> Iterator[Found]:
    """Every value of a config, at any depth, except in vocabularies."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield Found((*keys, key), inner)
        if key not in VOCABULARIES:
            yield from _walk(inner, (*keys, key))
    for inner in value if isinstance(value, list) else ():
        if isinstance(inner, (dict, list)):
            yield from _walk(inner, keys)
        elif keys and keys[-1] in FETCHED:
            yield Found(keys, inner)


def _check_code(found: Found, name: str, source: str) -> None:
    """Refuse what makes a library run code that it does not bring itself."""
    key, value = found.key, found.value
    if key in ("auto_map", "custom_pipelines") or (key == "trust_remote_code" and value):
        raise UnsafeCheckpoint(
            f"'{source}' wants to run its own code ({name}: {found.path}); hf-purify never does. If the architecture is part of transformers, "
            "save the model under it first"
        )
    kernel = key.endswith("_implementation") and "/" in (value if isinstance(value, str) else json.dumps(value))
    private = key.startswith(("_attn_implementation", "_experts_implementation")) or key == "kernel_config"
    if private or kernel or (key in ("use_kernels", "_use_kernels") and value):
        what = "private key" if private else "key"
        raise UnsafeCheckpoint(f"'{source}' sets the {what} '{found.path}' in {name}, which can load foreign code; remove it")


def _check_sources(found: Found, name: str, source: str, folder: Path) -> None:
    """Refuse names of files elsewhere, addresses that would be fetched, and second repositories."""
    key, value, where = found.key, found.value, f"'{name}' of '{source}' ({found.path})"
    if isinstance(value, str) and value and "pretrained_cfg" not in found.keys:  # timm is told to read the folder, whatever that says
        opened = key in FILES or (key.endswith("_file") and key not in FIXED and name != "config.json")
        if (opened or key in FETCHED) and ADDRESS.match(value):
            raise UnsafeCheckpoint(
                f"{where} is the address {shown(value)}, which would be fetched or opened; put the file beside the config"
            )
        if opened and not (key == "tokenizer_file" and (folder / "tokenizer.json").is_file()):  # which is read in its place
            check_name(value, where)
    if key in TIMM_ARGUMENTS and isinstance(value, dict) and (sources := [k for k in value if k in TIMM_SOURCES and value[k]]):
        raise UnsafeCheckpoint(f"{where} has timm read weights from elsewhere ({sources[0]}); remove it")
    if key in ("backbone", "architecture") and isinstance(value, str) and re.search(r"[/\\:]", value):
        raise UnsafeCheckpoint(f"{where} names {shown(value)}, another repository or folder; hf-purify reads the one that you named alone")


def _check_parts(config: dict[str, Any], name: str, source: str) -> None:
    """Refuse parts of a model that are of no type which transformers has."""
    kinds = {f.path: f.value for f in _walk(config) if f.key == "model_type" and len(f.keys) > 1 and f.value not in (None, "")}
    if not kinds or name in UNSIZED:
        return
    from transformers import CONFIG_MAPPING

    for path, kind in kinds.items():
        if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
            hint = did_you_mean(kind, CONFIG_MAPPING) if isinstance(kind, str) else ""
            raise ModelError(f"transformers has no models of type {shown(kind)}, which {path} in '{name}' of '{source}' names{hint}")
