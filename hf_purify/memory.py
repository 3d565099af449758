"""Bytes of each process that repairs a model under FSDP2.

    total      = weights + gathered + gradients + optimizer + activations
    weights    = (parameters / P) * bytes, each parameter's first axis rounded up to a share of P; buffers and the mask whole
    gathered   = what stays whole, and two layers: the one that runs and the one that is fetched; twice that with weight gradients
    gradients  = parameters / P * bytes where weights are learned; 4 bytes a neuron where a mask is
    optimizer  = that many bytes with momentum, twice that and 4 bytes a tensor with AdamW
    activations: counted, on the meta device, operation by operation, for the samples that a process runs (`rehearsal`)

A frozen network has no gradient and no optimizer state of its weights: that is what a mask saves.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_purify.loop import TrainConfig
from hf_purify.method import Training
from hf_purify.rehearsal import Cost
from hf_purify.task import movable


@dataclass(frozen=True)
class Memory:
    """Bytes on the device of each process.

    Args:
        weights: its share of the weights; buffers and the mask whole.
        gathered: layers that are whole for a while; on one process, copies of weights in the dtype that is computed in.
        gradients, optimizer: of what is learned.
        kept: activations that the forward pass leaves for the backward pass.
        passing: the most that a step holds for a moment beside them.
    """

    weights: int
    gathered: int
    gradients: int
    optimizer: int
    kept: int
    passing: int

    @property
    def total(self) -> int:
        return sum(dataclasses.asdict(self).values())


def memory_of(network: nn.Module, stored: torch.dtype, computed: torch.dtype, training: Training, processes: int, cost: Cost) -> Memory:
    """Bytes of each process; see the top of the module.

    Args:
        network: on the meta device.
        stored: dtype of the checkpoint's weights.
        computed: dtype of what a layer works with.
    """
    learned, train, alone = training.mask is None, training.train, processes == 1
    params = list(network.parameters())
    share = sum(_shard(p, processes) for p in params) * stored.itemsize
    weights = share + sum(b.numel() * b.element_size() for b in network.buffers())
    moved = {id(p): p for p in movable(network).values()} if learned else {}
    gradients = sum(_shard(p, processes) for p in moved.values()) * stored.itemsize if learned else 4 * len(training.mask or ())
    tensors = len(moved) or 1
    optimizer = 2 * gradients + 4 * tensors if train.optimizer == "adamw" else gradients * (train.momentum > 0)
    return Memory(
        weights + (0 if learned else gradients),  # a mask is as large as its gradient
        _cast(network, stored, computed) if alone else _gathered(network, learned) * computed.itemsize,
        gradients,
        optimizer,
        cost.kept,
        max(cost.peak, _stepping(train, gradients)) - cost.kept,
    )


def _shard(parameter: nn.Parameter, processes: int) -> int:
    """Values of a parameter that a process holds: FSDP2 cuts the first axis, and all shares are as large as the largest."""
    rows = parameter.shape[0] if parameter.dim() else 1
    return math.ceil(rows / processes) * (parameter.numel() // max(1, rows))


def _stepping(train: TrainConfig, gradients: int) -> int:
    """Bytes that the optimizer's step takes, when activations are gone: decayed gradients are copies."""
    return gradients if train.weight_decay and train.optimizer == "sgd" else 0


def _cast(network: nn.Module, stored: torch.dtype, computed: torch.dtype) -> int:
    """Bytes of the weights of layers in the dtype of autocast, which the graph keeps; none where they have it."""
    if stored == computed:
        return 0
    tables = {id(m.weight) for m in network.modules() if isinstance(m, nn.Embedding)}
    return sum(p.numel() for p in network.parameters() if p.dim() > 1 and id(p) not in tables) * computed.itemsize


def _gathered(network: Any, learned: bool) -> int:
    """Values of weights that are whole at once, at most, where transformers spreads a network (FSDP2).

    Layers and the embedding come and go, and the next one is fetched while one runs; what is in no layer (the head, the last norm) is
    counted as if it were there all the time. Gradients of a layer are whole too, and once more while they are sent.
    """
    split = set(getattr(network, "_no_split_modules", None) or ())
    units = [m for m in network.modules() if type(m).__name__ in split]
    table = network.get_input_embeddings() if hasattr(network, "get_input_embeddings") else None
    head = network.get_output_embeddings() if hasattr(network, "get_output_embeddings") else None
    if isinstance(table, nn.Module) and getattr(table, "weight", None) is not getattr(head, "weight", None):
        units.append(table)
    sizes = [sum(p.numel() for p in u.parameters()) for u in units]
    inside = {id(p) for u in units for p in u.parameters()}
    rest = sum(p.numel() for p in network.parameters() if id(p) not in inside)
    return rest + sum(sorted(sizes)[-2:]) * (2 if learned else 1)
