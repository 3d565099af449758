"""Pull checkpoints: one pinned commit, an allow-list of files, safetensors only, no remote code."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from hf_purify.errors import ModelError, UnsafeCheckpoint

ALLOWED = [
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "chat_template.jinja",
    "chat_template.json",
    "*.model",  # sentencepiece: a protocol buffer
    "adapter_config.json",
    "hf_purify.json",
    "provenance.json",
    "report.json",
    "README.md",
    "*.txt",
]
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".h5", ".msgpack")


@dataclass(frozen=True)
class Pulled:
    """A checkpoint's folder, and the commit it was read from (None for a local folder)."""

    folder: Path
    revision: str | None


def pull(source: str, revision: str | None = None) -> Pulled:
    """Return a folder with a checkpoint that is safe to read: the local folder itself, or a snapshot of a Hub repository.

    Raises:
        UnsafeCheckpoint: only pickles are there, or the checkpoint asks for remote code.
        ModelError: there is no such folder or repository, or no weights.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        check_folder(path, source)
        return Pulled(path, None)
    if path.exists():
        if path.name.endswith(PICKLES):
            raise pickle_error(source, [path.name])
        raise ModelError(f"expected a checkpoint folder or a Hub id, got the file '{source}'")
    _check_id(source)
    try:
        # resolves the revision once and takes all files from that commit; without a network, from the cache
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=ALLOWED, token=False))
        if not any(folder.glob("*.safetensors")):
            listed = HfApi().model_info(source, revision=folder.name, token=False).siblings or []
            _check_names([s.rfilename for s in listed], source)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ModelError(f"cannot read '{source}' from the Hub: {str(error).splitlines()[0]}") from error
    check_folder(folder, source)
    return Pulled(folder, folder.name)


def pull_config(source: str, revision: str | None = None) -> tuple[dict[str, Any], str | None]:
    """What the `config.json` of a folder or of a Hub repository says, or a file itself, and the commit it was read from. No weights are fetched.

    Raises:
        UnsafeCheckpoint: it asks for code of its own.
        ModelError: there is none, or it is no JSON object.
    """
    path = Path(source).expanduser()
    if path.exists():
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            raise ModelError(f"no config.json in '{source}'; expected a checkpoint of transformers or timm, or the file itself")
        return safe_config(file, source), None
    _check_id(source)
    try:
        file = Path(hf_hub_download(source, "config.json", revision=revision, token=False))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ModelError(f"cannot read the config.json of '{source}' from the Hub: {str(error).splitlines()[0]}") from error
    return safe_config(file, source), file.parent.name


def _check_id(source: str) -> None:
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise ModelError(f"no folder '{source}', and it is neither a Hub id (owner/name) nor a name that the modality's libraries know")


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """What the config of a pulled checkpoint says; empty where there is none or it is no JSON object."""
    try:
        config = json.loads((folder / name).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _check_names(names: list[str], source: str) -> None:
    if not any(n.endswith(".safetensors") for n in names):
        pickles = [n for n in names if n.endswith(PICKLES)]
        if pickles:
            raise pickle_error(source, pickles)
        raise ModelError(f"'{source}' holds no weights; expected model.safetensors")


def check_folder(folder: Path, source: str) -> None:
    """Refuse a folder without safetensors, and a config that asks for code of its own."""
    _check_names([p.name for p in folder.iterdir() if p.is_file()], source)
    for name in ("config.json", "preprocessor_config.json", "processor_config.json", "adapter_config.json"):
        file = folder / name
        if file.is_file():
            safe_config(file, source)


def safe_config(file: Path, source: str) -> dict[str, Any]:
    """What a config says.

    Raises:
        ModelError: it is no JSON object.
        UnsafeCheckpoint: it asks for code of its own.
    """
    name = file.name
    try:
        config = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ModelError(f"'{name}' of '{source}' is no valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"'{name}' of '{source}' must hold a JSON object, got {type(config).__name__}")
    if "auto_map" in config:
        raise UnsafeCheckpoint(
            f"'{source}' wants to run its own code ({name}: auto_map); hf-purify never does. If the architecture is part of transformers, save the model under it first"
        )
    private = [k for k in config if k.startswith("_attn_implementation") or k == "kernel_config"]
    if private:
        raise UnsafeCheckpoint(f"'{source}' sets the private key '{private[0]}' in {name}, which can load foreign code; remove it")
    return config


def pickle_error(source: str, files: list[str]) -> UnsafeCheckpoint:
    """The error for weights that are there as pickles alone."""
    return UnsafeCheckpoint(
        f"'{source}' holds its weights as pickles only ({', '.join(sorted(files)[:3])}), which can run any code when read. Convert them where it does no harm, "
        "for example with https://huggingface.co/spaces/safetensors/convert, or in an isolated machine: "
        "safetensors.torch.save_file(torch.load(file, weights_only=True), 'model.safetensors')"
    )
