"""Pull checkpoints: one pinned commit, an allow-list of files, safetensors only, no remote code.

listing = names and sizes at one commit       # with no token; with the user's where the repository is not public
refuse bad names, pickles alone, files too large
fetch what the allow-list names, at that commit
refuse links that leave, configs that ask for code or for other files, headers that are not what they should be
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token, hf_hub_download, metadata_load, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from yaml import YAMLError

from hf_purify.configs import CONFIGS, LARGEST_CONFIG, read_config, safe_config
from hf_purify.errors import ModelError, UnsafeCheckpoint, first_line
from hf_purify.filenames import check_links, check_listing
from hf_purify.files import replace_text
from hf_purify.weights import LARGEST_INDEX, check_weights

__all__ = ["ALLOWED", "PICKLES", "Pulled", "check_folder", "pickle_error", "pull", "pull_config", "read_config", "safe_config"]

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
LARGEST_CARD = 2**20  # bytes
LARGEST_TEXT = 256 * 2**20  # bytes of a tokenizer or a vocabulary, which libraries read whole
FAILURES = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError)


class Unreached(Exception):
    """The Hub does not answer, or must not be asked."""


@dataclass(frozen=True)
class Pulled:
    """A checkpoint's folder, and the commit it was read from (None for a local folder)."""

    folder: Path
    revision: str | None


@dataclass(frozen=True)
class Listing:
    """What a repository holds at one commit: the bytes of each file, None where the Hub does not say."""

    commit: str
    sizes: Mapping[str, int | None]


def pull(source: str, revision: str | None = None) -> Pulled:
    """Return a folder with a checkpoint that is safe to read: the local folder itself, or a snapshot of a Hub repository.

    Raises:
        UnsafeCheckpoint: pickles, or a checkpoint that asks for remote code, or whose files are made to do harm.
        ModelError: there is no such folder or repository, no weights, or broken ones.
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
        folder = _public_first(lambda token: _snapshot(source, revision, token))
    except FAILURES as error:
        raise ModelError(f"cannot read '{source}' from the Hub: {_reason(error, revision)}") from error
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
        file = _public_first(lambda token: _fetched_config(source, revision, token))
    except FAILURES as error:
        raise ModelError(f"cannot read the config.json of '{source}' from the Hub: {_reason(error, revision)}") from error
    return safe_config(file, source), file.parent.name


def _public_first(read: Callable[[str | bool], Path]) -> Path:
    """Read with no token, and once more with the user's where there is one and the Hub says that the repository is not public."""
    try:
        return read(False)
    except HfHubHTTPError as error:
        token = get_token()
        if token is None or not (isinstance(error, RepositoryNotFoundError) or _status(error) == 401):
            raise
        return read(token)


def _snapshot(source: str, revision: str | None, token: str | bool) -> Path:
    """The folder in the Hub's cache with the files that are wanted, of one commit; with no network, what the cache has."""
    try:
        listing = _list(source, revision, token)
    except Unreached as unreached:
        only: Any = {"allow_patterns": ALLOWED, "ignore_patterns": ["*/*"], "local_files_only": True}
        return _cached(lambda: snapshot_download(source, revision=revision, token=token, **only), unreached)
    _check_names(list(listing.sizes), source)
    wanted = [name for name in listing.sizes if "/" not in name and any(fnmatch(name, p) for p in ALLOWED)]
    for name in wanted:
        _check_size(name, listing.sizes[name], source)
    patterns = [glob.escape(name) for name in wanted]
    folder = Path(snapshot_download(source, revision=listing.commit, allow_patterns=patterns, token=token))
    _remember(folder, revision, listing.commit)
    return folder


def _fetched_config(source: str, revision: str | None, token: str | bool) -> Path:
    """The file in the Hub's cache; with no network, what the cache has."""
    try:
        listing = _list(source, revision, token)
    except Unreached as unreached:
        return _cached(lambda: hf_hub_download(source, "config.json", revision=revision, token=token, local_files_only=True), unreached)
    if "config.json" not in listing.sizes:
        raise ModelError(f"no config.json in '{source}'; expected a checkpoint of transformers or timm")
    _check_size("config.json", listing.sizes["config.json"], source)
    file = Path(hf_hub_download(source, "config.json", revision=listing.commit, token=token))
    _remember(file.parent, revision, listing.commit)
    return file


def _cached(read: Callable[[], str], unreached: Unreached) -> Path:
    """What the Hub's cache has of a repository that cannot be asked for."""
    try:
        return Path(read())
    except LocalEntryNotFoundError as error:
        raise LocalEntryNotFoundError(f"{unreached}, and the cache has no complete copy") from error


def _list(source: str, revision: str | None, token: str | bool) -> Listing:
    """What a repository holds at the commit that `revision` names now, its names checked."""
    try:
        found = HfApi().model_info(source, revision=revision, files_metadata=True, token=token)
    except HFValidationError:
        raise
    except Exception as error:  # without a network the HTTP library raises errors of its own, other ones in each version
        if isinstance(error, HfHubHTTPError) and _status(error) < 500:
            raise
        raise Unreached(f"it cannot be reached ({first_line(error)})") from error
    sizes = {s.rfilename: s.size for s in found.siblings or []}
    check_listing(sizes, ALLOWED, source)
    if not found.sha:
        raise ModelError(f"cannot read '{source}' from the Hub: it names no commit")
    return Listing(found.sha, sizes)


def _status(error: HfHubHTTPError) -> int:
    """The status of an answer of the Hub; 500 where there was none."""
    return getattr(getattr(error, "response", None), "status_code", 500)


def _remember(folder: Path, revision: str | None, commit: str) -> None:
    """Note in the Hub's cache what commit a branch or tag named, by which it is found offline."""
    if revision != commit:
        ref = folder.parents[1] / "refs" / (revision or "main")
        ref.parent.mkdir(parents=True, exist_ok=True)
        replace_text(ref, commit)


def split_name(name: str) -> tuple[str, str | None]:
    """A folder, or the id and the revision of `id@revision`."""
    source, _, revision = (name, "", "") if Path(name).is_dir() else name.partition("@")
    return source, revision or None


def read_metadata(folder: Path | None) -> dict[str, Any]:
    """What stands at the head of the card in a folder; empty where there is none that can be read."""
    card = folder / "README.md" if folder else None
    try:
        return (metadata_load(card) or {}) if card and card.is_file() and card.stat().st_size <= LARGEST_CARD else {}
    except (ValueError, YAMLError, RecursionError, OSError):
        return {}


def _check_id(source: str) -> None:
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise ModelError(f"no folder '{source}', and it is neither a Hub id (owner/name) nor a name that the modality's libraries know")


def _reason(error: Exception, revision: str | None) -> str:
    """Why a repository cannot be read, and what to do."""
    if isinstance(error, GatedRepoError):
        return "it is gated: ask for access on its page, and log in with `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return f"it has no branch, tag or commit '{revision}'"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such model, or it is private: log in with `hf auth login` as somebody who may read it"
    return first_line(error)


def _check_names(names: list[str], source: str) -> None:
    if not any(n.endswith(".safetensors") and "/" not in n for n in names):
        pickles = [n for n in names if n.endswith(PICKLES)]
        if pickles:
            raise pickle_error(source, pickles)
        raise ModelError(f"'{source}' holds no weights; expected model.safetensors")


def _check_size(name: str, size: int | None, source: str) -> None:
    """Refuse a file that would be read whole and is larger than any of its kind."""
    most = LARGEST_CONFIG if name in CONFIGS else LARGEST_INDEX if name.endswith(".index.json") else LARGEST_TEXT
    if size is not None and size > most and not name.endswith(".safetensors"):
        raise UnsafeCheckpoint(f"'{name}' of '{source}' has {size} bytes; expected at most {most}")


def check_folder(folder: Path, source: str) -> None:
    """Refuse a folder without safetensors, one whose files lead out of it, and configs and weights that are not safe to read."""
    check_links(folder, source)
    files = sorted(p for p in folder.iterdir() if p.is_file())
    _check_names([p.name for p in files], source)
    for file in files:
        if any(fnmatch(file.name, p) for p in ALLOWED):
            _check_size(file.name, file.stat().st_size, source)
        if file.name in CONFIGS:
            safe_config(file, source)
    check_weights(folder, source)


def pickle_error(source: str, files: list[str]) -> UnsafeCheckpoint:
    """The error for weights that are there as pickles alone."""
    return UnsafeCheckpoint(
        f"'{source}' holds its weights as pickles only ({', '.join(sorted(files)[:3])}), which can run any code when read. Convert them where it does no harm, "
        "for example with https://huggingface.co/spaces/safetensors/convert, or in an isolated machine: "
        "safetensors.torch.save_file(torch.load(file, weights_only=True), 'model.safetensors')"
    )
