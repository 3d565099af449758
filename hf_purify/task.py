"""What there is to train on or to look at: a `Task`, its batches, and what the model does with all samples."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_purify.adapter import Adapter, Batch, Examples, Loaded
from hf_purify.checkpointing import recomputed

BATCH_NORM = nn.modules.batchnorm._BatchNorm


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
    """

    model: nn.Module
    adapter: Adapter
    data: Examples
    generator: torch.Generator
    accelerator: Accelerator
    augmentation: str = "none"
    fixed: frozenset[str] = field(default=frozenset(), kw_only=True)
    recompute: bool = field(default=False, kw_only=True)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def parameters(self) -> list[nn.Parameter]:
        """What a repair may train."""
        return [p for n, p in movable(self.model).items() if n not in self.fixed]

    def recomputing(self) -> contextlib.AbstractContextManager[None]:
        """Gradient checkpointing, where it was asked for."""
        return recomputed(self.model) if self.recompute else contextlib.nullcontext()

    def logits(self, batch: Batch) -> Tensor:
        """What the model says, from a batch on any device."""
        return self.adapter.logits(self.model, {k: v.to(self.device) for k, v in batch.items()})

    def loss(self, batch: Batch) -> Tensor:
        """Clean loss per example `(B,)`."""
        return self.adapter.loss(self.model, batch)


def movable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that a repair may move, by name: all of floating point; of a model with a LoRA in it those of the LoRA alone."""
    found = {n: p for n, p in model.named_parameters() if p.is_floating_point()}
    return {n: p for n, p in found.items() if ".lora_" in n or ".modules_to_save." in n} or found


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers, on the CPU."""
    return {k: v.detach().to("cpu", copy=True) for k, v in model.state_dict().items()}


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
    """Samples of the task on its device, this process's share of them, augmented if asked."""
    world, rank = task.accelerator.num_processes, task.accelerator.process_index
    batch = task.data.batch(indices[rank::world] if world > 1 else indices)
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
    said, right, total = [], [], 0.0
    with mode(task.model, "eval"), task.accelerator.autocast():
        for indices in by_length(data, batch_size or task.adapter.at_once):
            batch = data.batch(indices)
            if augmentation != "none":
                batch = task.adapter.augment(batch, task.generator, augmentation)
            found, aims, losses = task.adapter.read(task.model, {k: v.to(task.device) for k, v in batch.items()})
            said.append(found.cpu())
            right.append(aims.cpu())
            total += float(losses.sum())
    return torch.cat(said), torch.cat(right), total / len(data)


@torch.no_grad()
def observe(task: Task, data: Examples, loaded: Loaded, title: str = "", batch_size: int | None = None) -> list[Any]:
    """What the model does with each sample, as its adapter observes it, in eval mode."""
    found: list[Any] = [None] * len(data)
    hidden = None if task.accelerator.is_main_process else True
    with mode(task.model, "eval"):
        for indices in tqdm(
            by_length(data, batch_size or task.adapter.at_once), desc=title or "observe", delay=2.0, leave=False, disable=hidden
        ):
            batch = {k: v.to(task.device) for k, v in data.batch(indices).items()}
            with task.accelerator.autocast():
                for i, value in zip(indices.tolist(), task.adapter.observe(task.model, batch, loaded), strict=True):
                    found[i] = value
    return found
