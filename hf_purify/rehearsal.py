"""A step without values: how many bytes and operations it takes, counted on the meta device, where no tensor takes any memory.

The step that is counted is the library's own: its masks, its loss, its gradient checkpointing, run by torch operation by operation.
Shapes are all that a count needs. Whole numbers keep their values, since token ids and masks decide which places are read.
"""

from __future__ import annotations

import contextlib
import functools
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from hf_purify.adapter import Adapter, Batch
from hf_purify.checkpointing import recomputed
from hf_purify.errors import ModelError, first_line
from hf_purify.masks import masked
from hf_purify.method import Training
from hf_purify.task import mode, movable

aten = torch.ops.aten
META = torch.device("meta")


@dataclass(frozen=True)
class Cost:
    """What a step on `samples` samples takes beside weights, gradients and optimizer state.

    Args:
        kept: bytes that the forward pass leaves for the backward pass.
        peak: bytes, the most that is held at any time of the step.
        forward, backward: floating-point operations of matrix products, convolutions and attention; a multiply-add counts two.
    """

    samples: int
    kept: int
    peak: int
    forward: int
    backward: int


def rehearse(
    adapter: Adapter, model: nn.Module, batch: Callable[[int], Batch], training: Training, samples: int, again: bool = False
) -> Cost:
    """Run one step of a training on the meta device and count.

    Gradients of weights are let go as soon as they are there, as FSDP2 does when it has sent them to their owners.

    Args:
        model: on the meta device, in the dtype that it computes in.
        batch: makes that many samples; see `adapter.Outline`.
        again: run layers again in the backward pass (gradient checkpointing).

    Raises:
        ModelError: the network needs values to run.
    """
    learned = list(movable(model).values())
    model.requires_grad_(False)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mode(model, training.train.mode))
        stack.enter_context(torch.enable_grad())
        if training.mask is not None:
            stack.enter_context(masked(model, training.mask, nn.Parameter(torch.ones(len(training.mask), device=META)), training.level))
        else:
            stack.enter_context(_learning(learned))
        stack.enter_context(recomputed(model) if again else contextlib.nullcontext())
        stack.enter_context(_fused_attention())
        books = stack.enter_context(_Books([*model.parameters(), *model.buffers()]))
        try:
            given = batch(samples)
            if training.train.mixup:
                given = adapter.mix(given, torch.arange(samples).roll(1), torch.tensor(0.5))
            loss = adapter.loss(model, given).mean()
            kept, forward = books.held, books.flops
            loss.backward()
        except RuntimeError as error:  # what torch raises where a tensor's values are asked for
            raise ModelError(f"{type(model).__name__} does not run without values, and cannot be estimated: {first_line(error)}") from error
        return Cost(samples, kept, books.peak, forward, books.flops - forward)


def between(low: Cost, high: Cost, samples: int) -> Cost:
    """The cost on a number of samples from `low.samples` to `high.samples`: what is kept and the operations grow in proportion, and a peak, which is
    the highest of several, at most so.
    """
    part = (samples - low.samples) / (high.samples - low.samples) if high.samples > low.samples else 0.0
    names = ("kept", "peak", "forward", "backward")
    return Cost(samples, **{n: math.ceil(getattr(low, n) + part * (getattr(high, n) - getattr(low, n))) for n in names})


@contextlib.contextmanager
def _learning(params: list[nn.Parameter]) -> Iterator[None]:
    """Gradients flow to these parameters, which keep none of them."""
    handles = [p.requires_grad_(True).register_post_accumulate_grad_hook(_let_go) for p in params]
    try:
        yield
    finally:
        for p, handle in zip(params, handles, strict=True):
            handle.remove()
            p.requires_grad_(False)


def _let_go(parameter: Tensor) -> None:
    parameter.grad = None


class _Books(TorchDispatchMode):
    """Bytes of all storages that were made while it is open and are still held, now and at most; and operations.

    torch's `FlopCounterMode` has the same formulas, but holds on to what is made again in a backward pass.

    Args:
        known: tensors that were there before.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.held = self.peak = self.flops = 0
        self._known = {t.untyped_storage()._cdata for t in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        on_meta = any(isinstance(t, Tensor) and t.is_meta for t in tree_leaves((args, kwargs)))
        if on_meta:
            if func is aten.index.Tensor:
                args = (args[0], _places(args[1]))
            args, kwargs = tree_map(_there, (args, kwargs))
        out = func(*args, **kwargs)
        if not on_meta and isinstance(out, Tensor) and out.is_meta and not out.is_floating_point():
            out = func(*args, **{**kwargs, "device": torch.device("cpu")})
        elif on_meta and func is aten._scaled_dot_product_flash_attention_for_cpu.default:  # the kernels lay heads out behind places
            out = (args[0].transpose(1, 2).new_empty(args[0].transpose(1, 2).shape).transpose(1, 2), out[1])
        if func._overloadpacket in _FLOPS:
            self.flops += _FLOPS[func._overloadpacket](*args, **kwargs, out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._enter(tensor.untyped_storage())
        return out

    def _enter(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self.held += storage.nbytes()
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self._leave, storage._cdata, storage.nbytes())

    def _leave(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.held -= size


def _there(value: Any) -> Any:
    return value.to(META) if isinstance(value, Tensor) else value


def _places(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Indices in which a mask of places is the list of them: how many there are, the meta device cannot tell."""
    found: list[Tensor | None] = []
    for index in indices:
        masks = index is not None and index.dtype == torch.bool and not index.is_meta
        found += index.nonzero().unbind(1) if masks and index is not None else [index]
    return found


@contextlib.contextmanager
def _fused_attention() -> Iterator[None]:
    """Attention by a fused kernel, as on a CPU or a GPU; the meta device would write out the table of all pairs of tokens.

    Put in the place of torch's function: a mode of torch would not be there when layers are run again in the backward pass.
    """
    plain = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = functools.partial(_fused, plain)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


def _fused(
    plain: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if query.dim() != 4 or value.shape[-1] != query.shape[-1] or (attn_mask is not None and attn_mask.requires_grad):
        return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    bias = attn_mask.to(META, query.dtype) if attn_mask is not None else None
    return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal, attn_mask=bias, scale=scale)[0]


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, *rest: Any, **_: Any) -> int:
    """Each gradient of a convolution costs what its forward pass does; torch's own count forgets the groups."""
    return 2 * grad.numel() * math.prod(weight.shape[1:]) * (bool(rest[-1][0]) + bool(rest[-1][1]))


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    heads = query.shape[:2]  # groups of them may share keys and values
    return sdpa_flop_count(query.shape, (*heads, *key.shape[2:]), (*heads, *value.shape[2:]))


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    heads = query.shape[:2]
    return sdpa_backward_flop_count(grad.shape, query.shape, (*heads, *key.shape[2:]), (*heads, *value.shape[2:]))


_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten.convolution_backward: _convolution_backward,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
