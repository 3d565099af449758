"""What there is to train on or to look at: a `Task`, its batches, and what the model does with all samples."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_purify.adapter import Adapter, Batch, Examples, Loaded
from hf_purify.checkpointing import recomputed
from hf_purify.resuming import Progress
from hf_purify.sharding import local
from hf_purify.sharing import BATCH_NORM, average, in_turn, shared


@dataclass
class Task:
    """What there is to train on: a model, its modality, clean samples, and a source of randomness.

    Args:
        model: the network, on `accelerator.device`.
        adapter: its modality.
        data: the samples to learn from.
        generator: CPU generator; the only source of randomness.
        augmentation: name of the adapter's augmentation, `none` for none.
        fixed: names of parameters that stay as they are.
        recompute: layers run again in the backward pass.
        accumulate: parts that a batch is run in, one after the other, for less memory.
        progress: checkpoints of the job; None for none.
        taken: steps that trackers know of, by the training's title.
    """

    model: nn.Module
    adapter: Adapter
    data: Examples
    generator: torch.Generator
    accelerator: Accelerator
    augmentation: str = "none"
    fixed: frozenset[str] = field(default=frozenset(), kw_only=True)
    recompute: bool = field(default=False, kw_only=True)
    accumulate: int = field(default=1, kw_only=True)
    progress: Progress | None = field(default=None, kw_only=True)
    taken: Counter[str] = field(default_factory=Counter, kw_only=True)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def parameters(self) -> list[nn.Parameter]:
        """What a repair may train."""
        return [p for n, p in movable(self.model).items() if n not in self.fixed]

    def recomputing(self) -> contextlib.AbstractContextManager[None]:
        """Gradient checkpointing, where it was asked for."""
        return recomputed(self.model) if self.recompute else contextlib.nullcontext()

    def logits(self, batch: Batch, model: nn.Module | None = None) -> Tensor:
        """What the model says, or another of its kind, from a batch on any device; each process runs its share."""
        chosen = self.model if model is None else model
        there = {k: v.to(self.device) for k, v in batch.items()}
        return shared(self.accelerator, lambda part: (self.adapter.logits(chosen, part),), there)[0]

    def loss(self, batch: Batch) -> Tensor:
        """Clean loss per example `(B,)`; each process runs its share."""
        return shared(self.accelerator, lambda part: (self.adapter.loss(self.model, part),), batch)[0]

    def both(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """`logits` and `loss` from one forward pass, of samples that are not mixed; each process runs its share."""
        logits, losses = shared(self.accelerator, lambda part: self.adapter.both(self.model, part), batch)
        return logits, losses

    def average(self, *tensors: Tensor) -> None:
        """What came of gradients of `loss`, in place: on several processes each knows those of its own rows until they are averaged."""
        average(self.accelerator, tensors)


def movable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that a repair may move, by name: all of floating point; of a model with a LoRA in it those of the LoRA alone."""
    found = {n: p for n, p in model.named_parameters() if p.is_floating_point()}
    return {n: p for n, p in found.items() if ".lora_" in n or ".modules_to_save." in n} or found


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers on the CPU; of those that are spread over processes, of what lies here."""
    return {k: local(v).to("cpu", copy=True) for k, v in model.state_dict().items()}


@torch.no_grad()
def put_back(model: nn.Module, kept: Mapping[str, Tensor]) -> None:
    """Give a model the values that `snapshot` took of it."""
    for name, value in model.state_dict().items():
        local(value).copy_(kept[name])


@contextlib.contextmanager
def mode(model: nn.Module, kind: str) -> Iterator[None]:
    """Put a model into `train`, `eval` or `frozen_norm` mode and back."""
    before = {m: m.training for m in model.modules()}
    model.train(kind != "eval")
    if kind == "frozen_norm":
        for module in model.modules():
            if isinstance(module, BATCH_NORM):
                module.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


def fetch(task: Task, indices: Tensor, augment: bool = False) -> Batch:
    """Samples of the task on its device, augmented if asked."""
    batch = task.data.batch(indices)
    if augment and task.augmentation != "none":
        batch = task.adapter.augment(batch, task.generator, task.augmentation)
    return {k: v.to(task.device, non_blocking=True) for k, v in batch.items()}


def by_length(data: Examples, batch_size: int) -> tuple[Tensor, ...]:
    """All samples in batches, those of like length together."""
    order = torch.arange(len(data)) if data.lengths is None else data.lengths.argsort(stable=True)
    return order.split(batch_size)


@torch.no_grad()
def reading(task: Task, data: Examples, augmentation: str = "none", batch_size: int | None = None) -> tuple[Tensor, Tensor, float]:
    """What is said of all samples, what should be, `(rows,)` each, and the mean loss, in eval mode; of augmented samples if asked."""
    batches: Sequence[Tensor | Batch] = by_length(data, batch_size or task.adapter.at_once)
    if augmentation != "none":  # drawn by all processes, whichever of them runs a batch
        batches = [task.adapter.augment(data.batch(i), task.generator, augmentation) for i in batches]  # type: ignore[arg-type]

    def read(item: Tensor | Batch) -> tuple[Tensor, Tensor, float]:
        batch = data.batch(item) if isinstance(item, Tensor) else item
        found, aims, losses = task.adapter.read(task.model, {k: v.to(task.device) for k, v in batch.items()})
        return found.cpu(), aims.cpu(), float(losses.sum())

    with mode(task.model, "eval"), task.accelerator.autocast():
        parts = in_turn(task.accelerator, batches, read)
    said, right, losses = zip(*parts, strict=True)
    return torch.cat(said), torch.cat(right), sum(losses) / len(data)


@torch.no_grad()
def observe(task: Task, data: Examples, loaded: Loaded, title: str = "", batch_size: int | None = None) -> list[Any]:
    """What the model does with each sample, as its adapter observes it, in eval mode."""
    hidden = None if task.accelerator.is_main_process else True
    batches = by_length(data, batch_size or task.adapter.at_once)

    def look(indices: Tensor) -> list[Any]:
        batch = {k: v.to(task.device) for k, v in data.batch(indices).items()}
        with task.accelerator.autocast():
            seen = task.adapter.observe(task.model, batch, loaded)
        bar.update()
        return seen

    with mode(task.model, "eval"), tqdm(total=len(batches), desc=title or "observe", delay=2.0, leave=False, disable=hidden) as bar:
        seen = in_turn(task.accelerator, batches, look)
    found: list[Any] = [None] * len(data)
    for i, value in zip(torch.cat(batches).tolist(), itertools.chain.from_iterable(seen), strict=True):
        found[i] = value
    return found
