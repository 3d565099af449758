"""A saved repair laid upon the files of the checkpoint that it was made for: no model is built, and no library of models asked.

apply(repair, to):
    base     <- pull(to)                        # pinned, safe; of the very weights that the repair names
    tensor   <- base[key] * mask along its axis # for each key that the mask file names; replaced ones are taken from it
    output   <- the base's files, with these tensors in the place of theirs
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from hf_purify.errors import IndexMismatch
from hf_purify.hub import ALLOWED
from hf_purify.masks import FORMAT, MASK_FILE
from hf_purify.neurons import ParamSlice, spread
from hf_purify.sharding import multiply_
from hf_purify.tensors import Tensors

PROVENANCE = "provenance.json"


@dataclass(frozen=True)
class Fold:
    """What a mask file does to tensors of a checkpoint, by their keys.

    Args:
        masks: for each key the masks that multiply slices of it, 1 = keep.
        replaced: tensors that take the place of those of the checkpoint.
        complete: base weights and these are the whole repair.
        neurons, removed: how many there are, and how many have a mask of at most .01.
    """

    masks: Mapping[str, list[tuple[ParamSlice, Tensor]]]
    replaced: Mapping[str, Tensor]
    complete: bool
    neurons: int
    removed: int

    def __call__(self, key: str, tensor: Tensor) -> Tensor:
        """The tensor of this key as the repair leaves it.

        Raises:
            IndexMismatch: it has another shape than the one that the repair was made for.
        """
        if key in self.replaced:
            value = self.replaced[key]
            if value.shape != tensor.shape:
                raise IndexMismatch(f"the repair replaces '{key}' by {tuple(value.shape)}, and the checkpoint holds {tuple(tensor.shape)}")
            return value.to(tensor.dtype)
        parts = self.masks.get(key, [])
        folded = tensor.clone() if parts else tensor
        for part, mask in parts:
            end = part.start + len(mask) * part.width
            if part.axis >= tensor.dim() or end > tensor.shape[part.axis]:
                raise IndexMismatch(
                    f"the repair masks {end} slices of '{key}' along axis {part.axis}, whose shape is {tuple(tensor.shape)}"
                )
            multiply_(folded, spread(mask, part), part.axis, part.start)
        return folded

    @cached_property
    def keys(self) -> frozenset[str]:
        return frozenset({*self.masks, *self.replaced})

    def check(self, base: Tensors) -> None:
        """Raises IndexMismatch where a checkpoint lacks what the repair changes."""
        strange = sorted(self.keys - set(base))
        if strange:
            raise IndexMismatch(f"the repair belongs to another model: it changes '{strange[0]}', which this checkpoint has not")


def read_fold(path: Path) -> Fold:
    """Read a mask file.

    Raises:
        IndexMismatch: it is none, or an early one that does not say which slices its masks belong to.
    """
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            stored = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - not a mapping
        slices = json.loads(meta.get("slices", "{}"))
        complete = bool(json.loads(meta.get("complete", "false")))
    except (SafetensorError, OSError, ValueError) as error:
        raise IndexMismatch(f"'{path.name}' cannot be read as a neuron mask: {error}") from error
    if meta.get("format") != FORMAT:
        raise IndexMismatch(f"'{path.name}' is no neuron mask: expected format '{FORMAT}', got '{meta.get('format')}'")
    masks: dict[str, list[tuple[ParamSlice, Tensor]]] = {}
    named = {k: v for k, v in stored.items() if k.startswith("mask/")}
    order = list(slices) if isinstance(slices, dict) else []
    for key in sorted(named, key=lambda k: order.index(k) if k in order else len(order)):  # two masks of one tensor round as they did
        mask = named[key]
        part = _part(slices[key] if key in order else None, key, path, mask)
        masks.setdefault(part.param, []).append((part, mask))
    replaced = {k.removeprefix("replaced/"): v for k, v in stored.items() if k.startswith("replaced/")}
    return Fold(masks, replaced, complete, sum(map(len, named.values())), sum(int((m <= 0.01).sum()) for m in named.values()))


def _part(found: Any, key: str, path: Path, mask: Tensor) -> ParamSlice:
    """Where a mask belongs, as the file says."""
    numbers = found[1:] if isinstance(found, list) and len(found) == 4 and isinstance(found[0], str) else []
    sound = [n for n in numbers if isinstance(n, int) and not isinstance(n, bool) and n >= 0]
    if len(sound) != 3 or sound[2] < 1 or mask.dim() != 1:
        raise IndexMismatch(f"'{path.name}' does not say which slices the mask '{key}' belongs to: it is damaged, or of an early version")
    return ParamSlice(found[0], *sound)


def folded(base: Tensors, fold: Fold) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a checkpoint, as a repair leaves them.

    Raises:
        IndexMismatch: the repair names tensors that are not there, or have another shape.
    """
    fold.check(base)
    for key in tqdm(base, desc="fold the repair", delay=2.0, leave=False, disable=None):
        yield key, fold(key, base[key])


def fold_files(base: Path, repair: Path, out: Path) -> None:
    """Write the files of the checkpoint in `base`, as the mask file in `repair` leaves it, to `out`; file by file as they were cut.

    Raises:
        IndexMismatch: the repair is not whole, or of another model.
    """
    fold = read_fold(repair / MASK_FILE)
    if not fold.complete:
        raise IndexMismatch(f"'{MASK_FILE}' is not the whole repair: its method trained weights too. Use the repaired checkpoint itself")
    with Tensors(base) as tensors:
        waiting: dict[Path, dict[str, Tensor]] = {}
        left = {path: list(tensors.files.values()).count(path) for path in set(tensors.files.values())}
        for key, value in folded(tensors, fold):
            path = tensors.files[key]
            waiting.setdefault(path, {})[key] = value.contiguous()
            left[path] -= 1
            if not left[path]:
                save_file(waiting.pop(path), out / path.name, metadata=tensors.metadata(path))
    for file in sorted(base.iterdir()):
        kept = file.is_file() and file.name.lower() != "readme.md" and any(fnmatch(file.name, p) for p in ALLOWED)
        if kept and file.name not in (MASK_FILE, PROVENANCE, "report.json") and not (out / file.name).exists():
            shutil.copyfile(file, out / file.name)
