"""Models whose parameters are spread over processes (FSDP2): what can be done to each process's part, and what needs all of it.

transformers spreads a model as it loads it, so that no process ever holds it whole. A parameter is a `DTensor` then, cut along its first axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(model: nn.Module) -> bool:
    """Are the parameters of a model spread over processes?"""
    return any(is_spread(p) for p in model.parameters())


def class_name(model: nn.Module) -> str:
    """The name of a model's class; FSDP makes another of it, with its own name in front."""
    return type(model).__name__.removeprefix("FSDP")


def is_spread(tensor: Tensor) -> bool:
    """Is a tensor spread over processes?"""
    return hasattr(tensor, "full_tensor")


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of all values of tensors together, spread or not; all processes must ask."""
    if not any(is_spread(t) for t in tensors):
        return torch.stack([t.norm() for t in tensors]).norm()
    squares = [local(t).float().square().sum() for t in tensors]
    there = torch.stack([s for s, t in zip(squares, tensors, strict=True) if is_spread(t)]).sum()
    torch.distributed.all_reduce(there)
    return torch.stack([there, *(s for s, t in zip(squares, tensors, strict=True) if not is_spread(t))]).sum().sqrt()


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: all of it, if it is not spread. A view."""
    found: Any = tensor.detach()
    return found.to_local() if is_spread(found) else found


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; of one that is spread all processes must ask."""
    found: Any = tensor.detach()
    return found.full_tensor() if is_spread(found) else found


def like(target: Tensor, value: Tensor) -> Tensor:
    """A whole value laid out as `target` is: on its device, and spread as it is."""
    value = value.to(target.device, target.dtype)
    if not is_spread(target):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, target.device_mesh, target.placements)  # type: ignore[attr-defined]


class Gathered(Mapping[str, Tensor]):
    """Whole tensors of what each process keeps of its part of a model, put together one at a time as they are asked for; all must ask alike.

    Args:
        model: as it is spread.
        kept: by name, what `task.snapshot` took of it here.
    """

    def __init__(self, model: nn.Module, kept: Mapping[str, Tensor]) -> None:
        self.targets: dict[str, Any] = dict(model.state_dict())
        self.kept = kept

    def __getitem__(self, name: str) -> Tensor:
        target, mine = self.targets[name], self.kept[name]
        if not is_spread(target):
            return mine
        from torch.distributed.tensor import DTensor

        there = mine.to(target.device)
        made: Any = DTensor.from_local(there, target.device_mesh, target.placements, shape=target.shape, stride=target.stride())
        return made.full_tensor().cpu()

    def __iter__(self) -> Iterator[str]:
        return iter(self.kept)

    def __len__(self) -> int:
        return len(self.kept)


@torch.no_grad()
def multiply_(tensor: Tensor, factor: Tensor, axis: int, start: int = 0) -> None:
    """Multiply `len(factor)` slices along `axis`, from `start` on, in place; of a spread tensor those that lie here."""
    mine, first = local(tensor), 0
    if is_spread(tensor):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        first = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1][axis]  # type: ignore[attr-defined]
    low, high = max(start, first), min(start + len(factor), first + mine.shape[axis])
    if low >= high:
        return
    shape = [1] * mine.dim()
    shape[axis] = -1
    mine.narrow(axis, low - first, high - low).mul_(factor[low - start : high - start].to(mine).view(shape))


class Original(nn.Module):
    """A spread model as it was, without a second model: for each forward pass its weights then are put in, and those now put back.

    FSDP refuses to copy a model. What is kept is this process's part alone.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = [model]  # not a submodule: its parameters are the model's own
        self.kept = [local(p).clone() for p in model.parameters()]  # buffers of a model with layers to spread hold positions, which stay

    def __getattr__(self, name: str) -> Any:
        """What else an adapter asks a model for: its config, its embeddings."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._model[0], name)

    @contextmanager
    def _put_in(self) -> Iterator[nn.Module]:
        model = self._model[0]
        modes = {m: m.training for m in model.modules()}
        now = [local(p).clone() for p in model.parameters()]
        try:
            self._copy(self.kept)
            model.eval()
            yield model
        finally:
            self._copy(now)
            for module, training in modes.items():
                module.training = training

    @torch.no_grad()
    def _copy(self, values: list[Tensor]) -> None:
        for p, value in zip(self._model[0].parameters(), values, strict=True):
            local(p).copy_(value)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._put_in() as model:
            return model(*args, **kwargs)
