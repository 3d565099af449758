"""Samples that become one tensor each: prepared for a model once, or batch by batch where they are too many. Shared by the modalities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_purify.adapter import Batch

Prepare = Callable[[list[Any]], Tensor]  # raw samples -> model input (n, ...)

_BUDGET = 4 * 2**30  # bytes of prepared samples kept in memory; beyond it they are prepared batch by batch
_CHUNK = 256


@dataclass
class _Derived:
    """A triggered sample: computed when it is asked for."""

    source: Any
    transform: Callable[[Any, int], Any]
    seed: int

    def get(self) -> Any:
        return self.transform(_raw(self.source), self.seed)


def _raw(source: Any) -> Any:
    return source.get() if isinstance(source, _Derived) else source


class PreparedExamples:
    """Raw samples with labels `(n,)`, and what prepares them for the model. A subclass says by which `key` a batch holds them."""

    key: str
    lengths = None

    def __init__(self, sources: Sequence[Any], labels: Tensor, prepare: Prepare, parent: PreparedExamples | None = None) -> None:
        self.sources, self.labels, self.prepare, self._parent = list(sources), labels, prepare, parent
        self._rows: Tensor | None = None  # where this view's samples lie in its parent; -1 where they are new
        self._block: Tensor | None = None

    def __len__(self) -> int:
        return len(self.sources)

    def raw(self, i: int) -> Any:
        return _raw(self.sources[i])

    def batch(self, indices: Tensor) -> Batch:
        if self._block is None and self._fits():
            self._block = self._build()
        if self._block is not None:
            return {self.key: self._block[indices], "labels": self.labels[indices]}
        return {self.key: self.prepare([self.raw(int(i)) for i in indices]), "labels": self.labels[indices]}

    def select(self, indices: Tensor) -> Self:
        view = type(self)([self.sources[int(i)] for i in indices], self.labels[indices], self.prepare, self)
        view._rows = indices.clone()
        return view

    def overlay(self, indices: Tensor, transform: Callable[[Any, int], Any], labels: Tensor, seed: int) -> Self:
        sources, targets = list(self.sources), self.labels.clone()
        rows = torch.arange(len(self))
        for i in indices.tolist():
            sources[i] = _Derived(sources[i], transform, seed + i)
        targets[indices] = labels
        rows[indices] = -1
        view = type(self)(sources, targets, self.prepare, self)
        view._rows = rows
        return view

    def _fits(self) -> bool:
        if not len(self):
            return False
        one = self.prepare([self.raw(0)])
        return one.numel() * one.element_size() * len(self) <= _BUDGET

    def _build(self) -> Tensor:
        """All prepared samples as one tensor; those that a parent has prepared already are copied from it."""
        known = self._rows if self._rows is not None and self._parent is not None and self._parent._block is not None else None
        new = (known < 0).nonzero().flatten() if known is not None else torch.arange(len(self))
        parts = [
            self.prepare([self.raw(int(i)) for i in chunk])
            for chunk in tqdm(new.split(_CHUNK), desc="prepare samples", delay=2.0, leave=False, disable=None)
            if len(chunk)
        ]
        fresh = torch.cat(parts) if parts else torch.empty(0)
        if known is None:
            return fresh
        block = self._parent._block[known.clamp_min(0)]  # type: ignore[union-attr, index]
        if len(new):
            block[new] = fresh
        return block
