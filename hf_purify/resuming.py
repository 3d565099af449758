"""Checkpoints of a running job: what its trainings left so far, and where the current one is.

A job is a row of trainings with little between them that costs anything, and all of it is repeatable. So a job is resumed by running it
again: a training that had ended leaves at once what it left then, and the one that was interrupted goes on from its last checkpoint.

    OUTPUT.checkpoint/
        manifest.json          # the job, versions, number of processes, and of each file its SHA-256; it alone says what counts
        0.safetensors, ...     # what the trainings left that have ended
        2-240.safetensors      # the current one after 240 steps

Tensors are kept as safetensors and all else as JSON: nothing in the folder is code, wherever it comes from.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hf_purify.errors import OutputError
from hf_purify.files import replace_text
from hf_purify.states import State

FORMAT = "hf-purify-checkpoint/1"
MANIFEST = "manifest.json"
log = get_logger(__name__)  # which speaks on the main process alone


class Stage:
    """One training of a job. This one keeps nothing: there are no checkpoints, or it is part of another training that has them."""

    saved: State | None = None  # at the last checkpoint
    ended: bool = False  # `saved` is what the training left

    def step(self, number: int, state: Callable[[], State]) -> None:
        """Called after each step, with the steps done so far."""

    def end(self, state: Callable[[], State]) -> None:
        """Called after the last."""


class _Kept(Stage):
    """A training with checkpoints."""

    def __init__(self, progress: Progress, title: str) -> None:
        self.progress, self.title, self.began = progress, title, time.perf_counter()
        number, known = progress.number, progress.stages
        entry = known[number] if number < len(known) else None
        if entry is None:
            return
        if entry["title"] != title:
            raise OutputError(
                f"the checkpoint '{progress.folder}' belongs to another course of this job: its training {number + 1} was '{entry['title']}', "
                f"and now it is '{title}'. Delete it to begin anew"
            )
        self.saved, self.ended = _read(progress.folder / entry["file"]), entry["ended"]
        progress.regained += self.saved.values["seconds"]
        self.began -= self.saved.values["seconds"]
        if not self.ended:
            log.warning("resuming '%s' at step %d (training %d of the job)", title, entry["step"], number + 1)

    def step(self, number: int, state: Callable[[], State]) -> None:
        if number % self.progress.every == 0:
            self._write(number, state, False)

    def end(self, state: Callable[[], State]) -> None:
        if not self.ended:
            self._write(None, state, True)

    def _write(self, step: int | None, state: Callable[[], State], ended: bool) -> None:
        kept = state()  # on all processes: the main one gathers what they have apart
        kept.values["seconds"] = time.perf_counter() - self.began
        self.progress.write(kept, {"title": self.title, "step": step, "ended": ended})


@dataclass
class Progress:
    """The checkpoints of one job.

    Args:
        folder: where they lie, on a file system that all processes see.
        every: steps between two of them.
        job: what makes the job what it is, JSON-able; another job is refused.
        versions: of the packages that it depends on; others are refused.
        accelerator: of the job.

    Raises:
        OutputError: what lies there is no checkpoint, is damaged, or is one of another job, version or number of processes.
    """

    folder: Path
    every: int
    job: Mapping[str, Any]
    versions: Mapping[str, str]
    accelerator: Accelerator
    stages: list[dict[str, Any]] = field(default_factory=list, init=False)
    number: int = field(default=0, init=False)  # of the next training
    regained: float = field(default=0.0, init=False)  # seconds that need not be spent again
    busy: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.job = broadcast_object_list([self.job])[0]  # of a model that is spread over processes each knows a part
        begun = self.folder.exists() and not _is_new(self.folder)
        if begun:
            self.stages = self._check(_manifest(self.folder))
        self.accelerator.wait_for_everyone()  # before the main process changes what the others read
        if self.accelerator.is_main_process:
            with self._writing():
                self.folder.mkdir(parents=True, exist_ok=True)
                if not begun:
                    self._write_manifest()  # first of all: a folder without one is refused
                self._clear()

    @property
    def record(self) -> dict[str, Any]:
        """What the manifest says of the job."""
        return {
            "format": FORMAT,
            "processes": self.accelerator.num_processes,
            "versions": dict(self.versions),
            "job": json.loads(json.dumps(self.job, default=str)),
        }

    def _check(self, found: dict[str, Any]) -> list[dict[str, Any]]:
        mine, what = self.record, f"the checkpoint '{self.folder}'"
        if found["processes"] != mine["processes"]:
            raise OutputError(
                f"{what} was written by {found['processes']} processes, and now there are {mine['processes']}: launch as many, or delete it"
            )
        for name, unlike in (("versions", "with other versions"), ("job", "by another job")):
            apart = [
                f"{k}: {found[name].get(k)!r} there, {mine[name].get(k)!r} here"
                for k in sorted(found[name].keys() | mine[name].keys())
                if found[name].get(k) != mine[name].get(k)
            ]
            if apart:
                raise OutputError(
                    f"{what} was written {unlike} ({'; '.join(apart)}): make them alike to go on from it, or delete it to begin anew"
                )
        for entry in found["stages"]:
            file = self.folder / entry["file"]
            if not file.is_file() or file.is_symlink() or _digest(file) != entry["sha256"]:
                raise OutputError(f"{what} is damaged: '{file.name}' is not what its manifest says. Delete it to begin anew")
        return found["stages"]

    def _clear(self) -> None:
        """Remove files that a kill left behind."""
        known = {MANIFEST, *(entry["file"] for entry in self.stages)}
        for file in self.folder.iterdir():
            if file.name not in known:
                file.unlink()

    def _write_manifest(self) -> None:
        replace_text(self.folder / MANIFEST, json.dumps(self.record | {"stages": self.stages}, indent=1) + "\n")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise OutputError(
                f"cannot write the checkpoint '{self.folder}': {error}; what was written before is kept, and the same command goes on from it"
            ) from error

    @contextlib.contextmanager
    def stage(self, title: str) -> Iterator[Stage]:
        """The next training of the job; one inside another is part of it."""
        if self.busy:
            yield Stage()
            return
        self.busy = True
        try:
            yield _Kept(self, title)
            self.number += 1
        finally:
            self.busy = False

    def write(self, state: State, entry: dict[str, Any]) -> None:
        """Keep a state as that of the current training; the last checkpoint stays until the new one counts."""
        last = self.stages[self.number]["file"] if self.number < len(self.stages) else None
        name = f"{self.number}.safetensors" if entry["ended"] else f"{self.number}-{entry['step']}.safetensors"
        if self.accelerator.is_main_process:
            file = self.folder / name
            with self._writing():
                try:
                    save_file({k: v.contiguous() for k, v in state.tensors.items()}, file, metadata={"values": json.dumps(state.values)})
                except BaseException:
                    file.unlink(missing_ok=True)
                    raise
                self.stages[self.number :] = [entry | {"file": name, "sha256": _digest(file)}]
                self._write_manifest()
                if last not in (None, name):
                    (self.folder / str(last)).unlink(missing_ok=True)
        else:
            self.stages[self.number :] = [entry | {"file": name, "sha256": ""}]


@contextlib.contextmanager
def kept(progress: Progress | None) -> Iterator[None]:
    """Around a job: its checkpoints are removed when it ends well; what interrupts it says that they are there."""
    try:
        yield
    except BaseException as reason:
        if progress and progress.stages:
            reason.add_note(f"the same command goes on from the checkpoint '{progress.folder}'")
        raise
    if progress and progress.accelerator.is_main_process:
        shutil.rmtree(progress.folder, ignore_errors=True)


def stage(progress: Progress | None, title: str) -> contextlib.AbstractContextManager[Stage]:
    """The next training of a job, with checkpoints where it has them."""
    return progress.stage(title) if progress else contextlib.nullcontext(Stage())


def _is_new(folder: Path) -> bool:
    """Whether nothing is there but what a kill leaves of a first manifest."""
    return folder.is_dir() and all(f.name.startswith(f".{MANIFEST}.") for f in folder.iterdir())


def _manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, held against its form."""
    path = folder / MANIFEST
    try:
        if not folder.is_dir():
            raise ValueError("it is no folder")
        found = json.loads(path.read_text("utf-8"))
        if found["format"] != FORMAT:
            raise ValueError(f"expected format '{FORMAT}', got {found['format']!r}")
        kinds = {"processes": int, "versions": dict, "job": dict, "stages": list}
        if not all(isinstance(found[k], kind) for k, kind in kinds.items()):
            raise ValueError("its manifest has another form")
        kinds = {"title": str, "file": str, "sha256": str, "ended": bool}
        if not all(isinstance(entry[k], kind) for entry in found["stages"] for k, kind in kinds.items()):
            raise ValueError("its manifest has another form")
        if any(Path(entry["file"]).name != entry["file"] for entry in found["stages"]):
            raise ValueError("its manifest names files elsewhere")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise OutputError(
            f"'{folder}' is no checkpoint of hf-purify ({error}): only what hf-purify wrote is resumed. Delete it, or name another output"
        ) from error
    return found


def _read(file: Path) -> State:
    with safe_open(file, framework="pt") as opened:
        values = json.loads((opened.metadata() or {})["values"])
        return State({k: opened.get_tensor(k) for k in opened.keys()}, values)  # noqa: SIM118 - not a mapping


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
