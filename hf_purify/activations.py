"""What neurons do on samples: their activations, read where a mask would scale them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_purify.neurons import NeuronGroup, NeuronIndex, get_tensor


@torch.no_grad()
def activation_change(model: nn.Module, index: NeuronIndex, run: Callable[[], object], other: Callable[[], object]) -> Tensor:
    """How much each neuron's activation differs between two runs on the same samples: the mean over samples of the norm of the difference.

    With a trigger on the samples of the second run this is the trigger-activated change (Zheng et al., NeurIPS 2022, arXiv 2206.00769), by which
    backdoored neurons are told where the trigger is known.

    Args:
        run, other: each calls the model once, with samples of one shape in one order.

    Returns:
        `(N,)`; 0 for groups whose activations pass no hook.
    """
    before, after = read(model, index, run), read(model, index, other)
    found = []
    for group in index:
        if group.name not in before:
            found.append(torch.zeros(group.size))
            continue
        gap = (after[group.name] - before[group.name]).float()
        found.append(gap.flatten(2).norm(dim=2).mean(0).cpu())
    return torch.cat(found) if found else torch.empty(0)


def read(model: nn.Module, index: NeuronIndex, run: Callable[[], object]) -> dict[str, Tensor]:
    """Activations by group, `(B, size, positions)`, of what `run` does with the model."""
    kept: dict[str, Tensor] = {}
    handles: list[Any] = []
    try:
        for group in index:
            if group.caller is None:
                handles.append(_hook(model, group, kept))
        run()
    finally:
        for handle in handles:
            handle.remove()
    return kept


def _hook(model: nn.Module, group: NeuronGroup, kept: dict[str, Tensor]) -> Any:
    module, gate = model.get_submodule(group.module), group.gate
    outputs = group.role == "head" or get_tensor(model, gate.param).dim() == 1
    second = hasattr(module, "in_channels") or hasattr(module, "running_mean")  # the axis of channels; it is the last one elsewhere

    def keep(values: Tensor) -> None:
        moved = values.detach().movedim(1 if second and values.dim() > 2 else -1, 1)
        columns = moved[:, gate.start : gate.start + group.size * gate.width]
        kept[group.name] = columns.reshape(len(moved), group.size, -1)

    if outputs:
        return module.register_forward_hook(lambda _, __, out: keep(out))
    return module.register_forward_pre_hook(lambda _, inputs: keep(inputs[0]))
