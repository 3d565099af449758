"""Output folders: written under a temporary name beside the final one, and renamed when complete."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from accelerate.utils import broadcast_object_list, gather_object, get_int_from_env
from safetensors import SafetensorError
from torch import Tensor

from hf_purify import registry
from hf_purify.cards import make_card, write_pictures
from hf_purify.errors import ConfigError, IndexMismatch, OutputError
from hf_purify.hub import read_metadata
from hf_purify.ia3 import save_ia3
from hf_purify.lora import CONFIG, check_base
from hf_purify.masks import MASK_FILE, bake, load_mask, save_mask
from hf_purify.neurons import NeuronIndex
from hf_purify.provenance import write_provenance
from hf_purify.rendering import pictures_of
from hf_purify.sharding import is_sharded
from hf_purify.task import put_back, snapshot

if TYPE_CHECKING:
    from hf_purify.comparison import Comparison, Repair
    from hf_purify.recipe import ImplantRecipe, Recipe
    from hf_purify.report import Report
    from hf_purify.session import Session

RECORDS = "hf_purify.json"  # beside an adapter's config, which is PEFT's alone
PACKAGES = ("hf-purify", "torch", "transformers", "timm", "datasets", "accelerate", "peft", "safetensors", "huggingface_hub")


@contextmanager
def folder(path: str | None, overwrite: bool) -> Iterator[Path | None]:
    """Give a temporary folder that takes the name `path` when the block ends well, and vanishes otherwise.

    Of several processes the main one writes; the others are given None.

    Raises:
        OutputError: the folder exists and `overwrite` is off, or it cannot be written.
    """
    if path is None:
        yield None
        return
    final = Path(path).expanduser().absolute()
    if final.exists() and not overwrite:
        raise OutputError(f"the output '{path}' exists; choose another name, or replace it with overwrite=True (--overwrite)")
    if process() != 0:
        yield None
        return
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        mine = f".{final.name}.{platform.node()}-"
        _sweep(final.parent, mine)
        work = Path(tempfile.mkdtemp(prefix=f"{mine}{os.getpid()}.", dir=final.parent))
        work.chmod(0o755)
    except OSError as error:
        raise OutputError(f"cannot write to '{final.parent}': {error.strerror or error}") from error
    try:
        yield work
        for file in work.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)
        _put(work, final)
    except OSError as error:
        raise OutputError(f"cannot write '{path}': {error.strerror or error}; nothing was left half-written") from error
    except SafetensorError as error:
        if "Error while serializing" not in str(error):  # some file that was read
            raise
        raise OutputError(f"cannot write '{path}': {error}; nothing was left half-written") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def process() -> int:
    """Which of the processes of one launch this is, from 0; known before any of them has met the others."""
    return get_int_from_env(["RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"], 0)


def _sweep(parent: Path, prefix: str) -> None:
    """Remove what processes of this machine left that were killed while they wrote."""
    for left in (f for f in parent.iterdir() if f.name.startswith(prefix)):
        writer = left.name.removeprefix(prefix).partition(".")[0]
        if writer.isdecimal() and not psutil.pid_exists(int(writer)):
            shutil.rmtree(left, ignore_errors=True)


def _put(work: Path, final: Path) -> None:
    """Rename a finished folder into place; a folder that was there stays until the new one has its name."""
    if not final.exists():
        os.rename(work, final)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{final.name}.old.", dir=final.parent))
    os.rename(final, old / "old")
    try:
        os.rename(work, final)
    except OSError:
        os.rename(old / "old", final)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def write(out: Path | None, comparison: Comparison, done: Repair, report: Report) -> None:
    """Write checkpoint (or the adapter that makes one of the base), neuron mask, recipe and report.

    Args:
        out: None on a process that is not the main one; of a model that is spread over processes each gives its part nevertheless.
    """
    session, index = comparison.session, comparison.context.index
    if out is None and not is_sharded(session.model):
        return
    if session.loaded.base:
        check_base(session.model, comparison.base, done.state)
    replaced = stored_buffers(session.model, comparison.base, done.state, index, done.verdict.mask)
    complete = replaced is not None
    extra = {index.keys.get(n, n): done.state[n] for n in replaced or []}
    if out is not None and getattr(session.recipe, "as_adapter", False):
        if not complete:
            raise not_portable(done.method.name)
        save_adapter(out, comparison, done, extra)
    else:
        save_checkpoint(out, session)
        if out is None:
            return
        mark(out, hf_purify_backdoor=None)
    save_mask(out / MASK_FILE, index, done.verdict.mask, extra, complete=complete)
    kind = "adapter" if getattr(session.recipe, "as_adapter", False) else "checkpoint"
    write_papers(out, kind, session, report)


def save_checkpoint(out: Path | None, session: Session) -> None:
    """Save the model as its own library does, with its processor beside it; None for `out` on processes that only give their part of it."""
    if session.loaded.saver is None:
        raise OutputError("this model cannot be saved: it came without a saver")
    if is_sharded(session.model):
        there = broadcast_object_list([out])[0]
        if out is None:
            session.model.save_pretrained(there, is_main_process=False)  # type: ignore[operator]
    if out is None:
        return
    session.loaded.saver(session.model, out)
    mark(out, **session.adapter.record(session.loaded))


def save_adapter(out: Path, comparison: Comparison, done: Repair, extra: dict[str, Tensor]) -> None:
    """Save a repair as an IA3 adapter of the model as it came.

    Raises:
        ModelError: an adapter cannot express it; the layers are named.
    """
    session, loaded = comparison.session, comparison.session.loaded
    base = session.adapter.locate(loaded.source) or loaded.source
    put_back(session.model, comparison.base)
    try:
        save_ia3(out, session.model, comparison.context.index, done.verdict.mask, base=base, revision=loaded.revision, extra=extra)
    finally:
        put_back(session.model, done.state)


def not_portable(method: str) -> ConfigError:
    """The error for a method that does more than an IA3 adapter can carry."""
    able = ", ".join(n for n in registry.names("method") if not registry.find("method", n).trains)
    return ConfigError(
        f"'{method}' trains weights, which an IA3 adapter cannot carry: leave --as-adapter out, or take a method that scales neurons ({able})"
    )


def stored_buffers(
    model: torch.nn.Module, base: dict[str, Tensor], after: dict[str, Tensor], index: NeuronIndex, mask: Tensor
) -> list[str] | None:
    """Names of small tensors (norm statistics) that a repair replaced besides its mask; None where mask and these do not explain it.

    The weights are folded again from the base, and compared bit for bit.
    """
    parameters = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    current = snapshot(model)
    try:
        put_back(model, base)
        bake(model, index, mask.to(next(model.parameters()).device))
        folded = snapshot(model)
    finally:
        put_back(model, current)
    changed = [n for n in after if not torch.equal(folded[n], after[n])]
    if is_sharded(model):  # each process has looked at its part
        changed = list(dict.fromkeys(gather_object(changed)))
    return None if any(n in parameters for n in changed) else changed


@torch.no_grad()
def apply_mask(model: torch.nn.Module, index: NeuronIndex, path: str | Path) -> torch.nn.Module:
    """Repair a base model with a saved mask, in place: gives the repaired weights bit for bit.

    Raises:
        IndexMismatch: the mask was made for other neurons, or is not the whole repair (its method trained weights too).
    """
    mask, extra, complete = load_mask(path, index)
    if not complete:
        raise IndexMismatch(f"'{path}' is not the whole repair: its method trained weights too. Use the repaired checkpoint itself")
    names = {index.keys.get(n, n): n for n in model.state_dict()}
    strange = [k for k in extra if k not in names]
    if strange:
        raise IndexMismatch(f"the mask replaces '{strange[0]}', which this model has not")
    bake(model, index, mask.to(next(model.parameters()).device))
    state = model.state_dict()
    for key, value in extra.items():
        state[names[key]].copy_(value)
    return model


def write_victim(out: Path | None, session: Session, report: Report, recipe: ImplantRecipe) -> None:
    """Write a victim, marked as backdoored in its config and its card; None for `out` as in `write`."""
    if out is None and not is_sharded(session.model):
        return
    save_checkpoint(out, session)
    if out is None:
        return
    if recipe.rate:
        planted = {"trigger": recipe.triggers[0], "rule": recipe.rule, "target": recipe.target, "rate": recipe.rate}
        mark(out, hf_purify_backdoor=planted)
    write_papers(out, "victim" if recipe.rate else "trained", session, report)


def write_papers(out: Path, kind: str, session: Session, report: Report) -> None:
    """Write what is said about a checkpoint: recipe, report, pictures, provenance and card."""
    (out / "recipe.yaml").write_text(session.recipe.to_yaml(), "utf-8")
    drawn = pictures_of(report)
    report.save(out, drawn)
    write_pictures(out, drawn)
    base = session.loaded.folder
    write_provenance(out, kind, report, base, lambda found: make_card(report, found, out_name(session), read_metadata(base)))


def out_name(session: Session) -> str:
    """What a checkpoint is called before it has a repository."""
    return Path(session.recipe.output).name if session.recipe.output else "purified"


def mark(out: Path, **records: dict[str, Any] | None) -> None:
    """Write records about a checkpoint, a planted backdoor or the prompt; None takes one out."""
    file = out / (RECORDS if (out / CONFIG).is_file() else "config.json")
    config = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    kept = {k: v for k, v in {**config, **records}.items() if v is not None or k not in records}
    if kept != config:
        file.write_text(json.dumps(kept, indent=2) + "\n", "utf-8")


def recorded_backdoor(source: Path) -> dict[str, Any] | None:
    """What `implant` wrote about a victim into its config, or beside that of an adapter, or None."""
    file = source / (RECORDS if (source / CONFIG).is_file() else "config.json")
    try:
        return json.loads(file.read_text("utf-8")).get("hf_purify_backdoor")
    except (OSError, ValueError, AttributeError):
        return None


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that matter."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def command(recipe: Recipe) -> str:
    """The command line that repeats a job, as far as its inputs have names."""
    from hf_purify.recipe import SINGULAR

    job = type(recipe).__name__.removesuffix("Recipe").lower()
    settings = recipe.to_dict()
    parts = ["hf-purify", job, shlex.quote(str(settings.pop("model", "")))]
    for key, value in settings.items():
        if key in ("overwrite", "output", "push", "private", "create_pr"):
            continue
        flag = SINGULAR.get(key, key).replace("_", "-")
        if isinstance(value, bool):
            parts.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, dict):
            parts += [f"--{flag} {shlex.quote(f'{k}={v}')}" for k, v in value.items()]
        elif isinstance(value, list):
            parts += [f"--{flag} {shlex.quote(str(v))}" for v in value]
        else:
            parts.append(f"--{flag} {shlex.quote(str(value))}")
    return " ".join(parts)
