"""Tensors as they lie in the safetensors files of a checkpoint: read one at a time, without a model of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_purify.errors import ModelError
from hf_purify.masks import MASK_FILE
from hf_purify.weights import check_weights


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's weights, their headers checked: the whole model, or its shards; never a mask's."""
    return [folder / name for name in check_weights(folder, str(folder)) if name != MASK_FILE]


class Tensors(Mapping[str, Tensor]):
    """A checkpoint's tensors by key, read when they are asked for.

    Raises:
        ModelError: a file cannot be read, or two hold one key.
    """

    def __init__(self, folder: Path) -> None:
        self.files: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        for path in weight_files(folder):
            try:
                self._open[path] = safe_open(path, framework="pt").__enter__()
            except (SafetensorError, OSError) as error:
                raise ModelError(f"'{path.name}' in '{folder}' cannot be read as safetensors: {error}") from error
            for key in self._open[path].keys():  # noqa: SIM118 - not a mapping
                if key in self.files:
                    raise ModelError(f"'{folder}' holds the tensor '{key}' twice, in {self.files[key].name} and in {path.name}")
                self.files[key] = path

    def __getitem__(self, key: str) -> Tensor:
        return self._open[self.files[key]].get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def metadata(self, path: Path) -> dict[str, str]:
        """What the header of one of the files says besides its tensors."""
        return dict(self._open[path].metadata() or {})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in self._open.values():
            file.__exit__(kind, error, trace)


BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of a value: an integer of as many


@dataclass(frozen=True)
class Difference:
    """How one tensor differs from another of the same key.

    Args:
        values: values that differ, bit for bit.
        of: values in all.
        relative: `||after - before|| / ||before||`; None where it is not finite, or the shapes differ.
        what: `changed`, `missing`, `new`, `shape` or `dtype`.
    """

    values: int
    of: int
    relative: float | None
    what: str = "changed"


def difference(before: Tensor | None, after: Tensor | None) -> Difference | None:
    """What distinguishes two tensors; None where they are the same bit for bit. One that is not there is None."""
    if before is None or after is None:
        there = after if before is None else before
        size = 0 if there is None else there.numel()
        return Difference(size, size, None, "new" if before is None else "missing")
    if before.shape != after.shape:
        return Difference(after.numel(), after.numel(), None, "shape")
    retyped = before.dtype != after.dtype
    changed = after.numel() if retyped else _changed(before, after)
    if not changed and not retyped:
        return None
    relative = _relative(before, after) if changed else 0.0
    return Difference(changed, after.numel(), relative, "dtype" if retyped else "changed")


def _relative(before: Tensor, after: Tensor) -> float | None:
    """`||after - before|| / ||before||` to six digits; None where it is not finite."""
    work = torch.float64 if before.dtype in (torch.float64, torch.int64) else torch.float32
    old, new = before.to(work), after.to(work)
    far, long = (float(torch.linalg.vector_norm(v, dtype=torch.float64)) for v in (new - old, old))
    found = far / max(long, 1e-30)
    return float(f"{found:.6g}") if math.isfinite(found) else None


def _changed(before: Tensor, after: Tensor) -> int:
    """How many values are other bytes; `0.0 == -0.0` holds for values that are."""
    size = before.element_size()
    whole = BITS.get(size, torch.uint8)
    old, new = (t.contiguous().flatten().view(whole) for t in (before, after))
    if torch.equal(old, new):
        return 0
    other = old != new
    return int((other if size == whole.itemsize else other.view(-1, size // whole.itemsize).any(1)).count_nonzero())
