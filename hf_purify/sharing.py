"""One batch on several processes: each runs the model on its share of the rows, and all know every row of what comes out.

Losses, random draws and recovered triggers are then what they would be on one process, and all processes take the same decisions. Each
works out the loss of the whole batch, of which its own rows lead back into its own model; gradients are averaged afterwards, so
those of the rows count as often as there are processes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hf_purify.adapter import Batch
from hf_purify.sharding import is_spread

BATCH_NORM = nn.modules.batchnorm._BatchNorm
_WHOLE: ContextVar[bool] = ContextVar("whole", default=False)  # this process has the whole batch


def shared(accelerator: Accelerator, run: Callable[[Batch], tuple[Tensor, ...]], batch: Batch) -> tuple[Tensor, ...]:
    """`run(batch)`, of which this process has run its share of the rows alone.

    A batch with fewer rows than there are processes is run whole by each.

    Args:
        run: gives tensors with rows in the order of the batch's: one for each sample, or any number.
        batch: of mixed samples, `run` must give one row for each.
    """
    size, world = len(batch["labels"]), accelerator.num_processes
    if world == 1:
        return run(batch)
    if size < world:
        token = _WHOLE.set(True)
        try:
            return run(batch)
        finally:
            _WHOLE.reset(token)
    rows = torch.arange(size).tensor_split(world)[accelerator.process_index]
    part = part_of(batch, rows.to(batch["labels"].device))
    cut = len(part["labels"]) - len(rows)
    found = [out[: len(out) - cut] if cut else out for out in run(part)]
    return tuple(_AllRows.apply(out, accelerator) for out in found)


def part_of(batch: Batch, rows: Tensor) -> Batch:
    """Some rows of a batch; of samples that are mixed inside the model, their partners follow behind."""
    if "partner" not in batch:
        return {k: v[rows] if v.dim() else v for k, v in batch.items()}
    partners = batch["partner"][rows]
    unique = partners.unique()
    every = torch.cat([rows, unique[~torch.isin(unique, rows)]])
    place = torch.zeros_like(batch["partner"])
    place[every] = torch.arange(len(every), device=every.device)
    part = {k: v[every] if v.dim() else v for k, v in batch.items()}
    part["partner"] = torch.cat([place[partners], torch.arange(len(rows), len(every), device=every.device)])
    return part


class _AllRows(torch.autograd.Function):
    """The rows of all processes, in their order."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, accelerator: Accelerator) -> Tensor:
        counts = accelerator.gather(torch.tensor([len(mine)], device=mine.device)).tolist()
        padded = F.pad(mine, [0, 0] * (mine.dim() - 1) + [0, max(counts) - len(mine)])
        every = accelerator.gather(padded.contiguous()).split(max(counts))
        before = sum(counts[: accelerator.process_index])
        ctx.mine, ctx.world = slice(before, before + len(mine)), accelerator.num_processes
        return torch.cat([part[:count] for part, count in zip(every, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.world * grads[0][ctx.mine], None


class _BatchNorm(torch.autograd.Function):
    """Batch normalisation by the statistics of all processes' rows, with one exchange in each direction; gives those statistics, too."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, accelerator: Accelerator
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        axes = [i for i in range(x.dim()) if i != 1]
        spread, own = torch.var_mean(x.float(), axes, correction=0)
        count = torch.full_like(own, x.numel() / x.shape[1])
        means, spreads, counts = accelerator.gather(torch.stack([own, spread, count])[None]).unbind(1)
        n = counts.sum(0)
        mean = (counts * means).sum(0) / n
        variance = (counts * (spreads + (means - mean).square())).sum(0) / n
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt(), n)
        ctx.accelerator, ctx.axes = accelerator, axes
        ctx.mark_non_differentiable(mean, variance, n)
        kind = (x if weight is None else weight).dtype
        return F.batch_norm(x, mean.to(kind), variance.to(kind), weight, bias, False, 0.0, eps), mean, variance, n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        x, weight, mean, scale, n = ctx.saved_tensors
        shape = [1, -1, *[1] * (x.dim() - 2)]
        grad, normal = grads[0].float(), (x.float() - mean.view(shape)) * scale.view(shape)
        sums = torch.stack([grad.sum(ctx.axes), (grad * normal).sum(ctx.axes)])
        shift, stretch = ctx.accelerator.reduce(sums.clone(), reduction="sum") / n
        factor = scale if weight is None else scale * weight
        inputs = (grad - shift.view(shape) - normal * stretch.view(shape)) * factor.view(shape)
        own = (None, None) if weight is None else (sums[1].to(weight), sums[0].to(weight))
        return inputs.to(x), *own, None, None


@contextlib.contextmanager
def batch_statistics(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Within, batch norms in train mode normalise by the whole batch, not by a process's share of it.

    torch has that for GPUs alone, as a module that takes the place of others (`SyncBatchNorm`).
    """
    norms: list[Any] = [m for m in model.modules() if isinstance(m, BATCH_NORM)] if accelerator.num_processes > 1 else []
    norms = [m for m in norms if "forward" not in vars(m)]  # another such context around this one
    for norm in norms:
        norm.forward = functools.partial(_over_all, norm.forward, accelerator)
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def _over_all(forward: Callable[[Tensor], Tensor], accelerator: Accelerator, x: Tensor) -> Tensor:
    with contextlib.nullcontext() if _WHOLE.get() else _WholeBatch(accelerator):
        return forward(x)


class _WholeBatch(TorchFunctionMode):
    """`F.batch_norm` with the statistics of all processes; what a library's norm does besides stays as it is."""

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__()
        self.accelerator = accelerator

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.batch_norm and kwargs["training"]:
            return self._norm(*args, **kwargs)
        return function(*args, **(kwargs or {}))

    def _norm(
        self,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
    ) -> Tensor:
        out, mean, variance, n = _BatchNorm.apply(x, weight, bias, eps, self.accelerator)
        if running_mean is not None and running_var is not None:
            with torch.no_grad():
                running_mean.lerp_(mean.to(running_mean), momentum)
                running_var.lerp_((variance * n / (n - 1).clamp(min=1)).to(running_var), momentum)
        return out


def average(accelerator: Accelerator, tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their means over processes, in place, in one exchange for each dtype; FSDP has done it for those that are spread."""
    tensors = [t for t in tensors if not is_spread(t)]
    if accelerator.num_processes == 1 or not tensors:
        return
    for dtype in {t.dtype: None for t in tensors}:
        mine = [t for t in tensors if t.dtype == dtype]
        flat = accelerator.reduce(torch.cat([t.flatten() for t in mine]), reduction="mean")
        for t, mean in zip(mine, flat.split([t.numel() for t in mine]), strict=True):
            t.copy_(mean.view_as(t))


def in_turn(accelerator: Accelerator, items: Sequence[Any], run: Callable[[Any], Any]) -> list[Any]:
    """`[run(item) for item in items]`, each item on one process; all processes run equally often, as models that are sharded must."""
    world, rank = accelerator.num_processes, accelerator.process_index
    if world == 1:
        return [run(item) for item in items]
    mine = [run(items[min(start + rank, len(items) - 1)]) for start in range(0, len(items), world)]
    every = gather_object([(rank + world * i, found) for i, found in enumerate(mine)])
    known = dict(every)
    return [known[i] for i in range(len(items))]
