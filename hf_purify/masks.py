"""Neuron masks: a differentiable context, folding into the weights, and files.

A mask is one `(N,)` tensor aligned with a `NeuronIndex`; 1 keeps a neuron, 0 removes it. Neuron `i` is scaled at its
group's gate: the scale of a norm (its bias is left alone unless `bias=True`), the input of a layer for hidden units
and attention values, the output of a layer for class rows.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.utils import parametrize

from hf_purify.errors import ConfigError, IndexMismatch
from hf_purify.neurons import NeuronGroup, NeuronIndex, ParamSlice, get_tensor, shaped, spread
from hf_purify.sharding import is_sharded, multiply_

MASK_FILE = "neuron_mask.safetensors"
FORMAT = "hf-purify/1"
MASK_NAME = "neuron_mask"  # the parameter at the root of the model while a context is open


class _Scale(nn.Module):
    """The parametrization of the weight level: multiplies the slices of one parameter."""

    def __init__(self, views: Callable[[], dict[str, Tensor]], group: str, part: ParamSlice) -> None:
        super().__init__()
        self.views, self.group, self.part = views, group, part

    def forward(self, weight: Tensor) -> Tensor:
        return _scaled(weight, self.views()[self.group], self.part)


def _scaled(weight: Tensor, scale: Tensor, part: ParamSlice) -> Tensor:
    """A parameter with what the neurons of a group own in it multiplied by `scale`, one value per neuron."""
    scale = spread(scale, part).to(weight.device, weight.dtype)
    if scale.numel() != weight.shape[part.axis]:
        full = weight.new_ones(weight.shape[part.axis])
        scale = torch.cat([full[: part.start], scale, full[part.start + scale.numel() :]])
    return weight * shaped(scale, weight.dim(), part.axis)


def _parts(group: NeuronGroup, bias: bool) -> list[ParamSlice]:
    """What a mask multiplies: the gate, and the bias beside it if asked."""
    return [group.gate, *([group.bias] if bias and group.bias else [])]


class _Views:
    """The mask cut into one view per group, once per forward pass, so that its gradient is assembled once."""

    def __init__(self, index: NeuronIndex, mask: Tensor) -> None:
        self.index, self.mask = index, mask
        self.current = index.split(mask)

    def refresh(self, *_: object) -> None:
        self.current = self.index.split(self.mask)

    def __call__(self) -> dict[str, Tensor]:
        return self.current


def _swap_hooks(runs: nn.Module, holds: nn.Module, parts: list[ParamSlice], scale: Callable[[], Tensor]) -> list[Any]:
    """Hooks that replace tensors of the module `holds` by scaled ones while the forward of the module `runs` does."""
    saved: dict[str, Tensor] = {}

    def store(name: str) -> dict[str, Any]:
        return holds._parameters if name in holds._parameters else holds._buffers

    def before(_: nn.Module, __: tuple) -> None:
        factor = scale()
        for part in parts:
            name = part.param.rpartition(".")[2]
            saved[name] = store(name)[name]
            store(name)[name] = _scaled(saved[name], factor, part)

    def after(*_: object) -> None:
        for name, value in saved.items():
            store(name)[name] = value
        saved.clear()

    # two groups may scale one tensor: what was swapped last is put back first
    return [runs.register_forward_pre_hook(before), runs.register_forward_hook(after, always_call=True, prepend=True), _Undo(after)]


class _Undo:
    """Something to call when the context closes, in the shape of a hook handle."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.remove = call


# What makes an activation once more from what its node in the graph keeps anyway: the names of that, and the function of it.
# GPT-2's activation and gated units (SwiGLU) end in a product.
_AGAIN: dict[str, tuple[tuple[str, ...], Callable[[Any], Callable[..., Tensor]]]] = {
    "GeluBackward0": (("self",), lambda node: partial(F.gelu, approximate=node._saved_approximate)),
    "SiluBackward0": (("self",), lambda node: F.silu),
    "MulBackward0": (("self", "other"), lambda node: torch.mul),
}


class _Product(torch.autograd.Function):
    """`x * scale`; the gradient of `scale` needs `x`, which is not kept but made again from what is kept anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, again: Callable[..., Tensor], kept: list[Tensor]) -> Tensor:
        ctx.again = again
        ctx.save_for_backward(scale, *kept)
        return x * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scale, *kept = ctx.saved_tensors
        of_scale = (grad * ctx.again(*kept)).sum_to_size(scale.shape)  # first, while little else is held
        return grad * scale, of_scale, None, None


def _product(x: Tensor, scale: Tensor) -> Tensor:
    """`x * scale`, with the gradients of the plain product; behind an activation function it does without a copy of `x`."""
    if scale.requires_grad and not _traced(x, scale) and (source := _source(x)):
        return _Product.apply(x, scale, *source)
    return x * scale


def _traced(*tensors: Tensor) -> bool:
    """Whether more than plain autograd looks on: compilers, `torch.func`, forward mode, subclasses of tensors."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or torch._C._are_functorch_transforms_active()
        or any(type(t) is not Tensor or forward_ad.unpack_dual(t).tangent is not None for t in tensors)
    )


def _source(x: Tensor) -> tuple[Callable[..., Tensor], list[Tensor]] | None:
    """What makes `x` again, and from what; none where `x` was changed in place, or where hooks have packed what it needs.

    Gradient checkpointing packs so, and so does offloading: to unpack means to compute or to copy. Older versions of torch do not tell.
    """
    node: Any = x.grad_fn
    if node is None or node.name() not in _AGAIN or x._version or not x.is_floating_point():
        return None
    names, function = _AGAIN[node.name()]
    try:
        if any(getattr(getattr(node, f"_raw_saved_{name}"), "unpack_hook", True) is not None for name in names):
            return None
        kept = [getattr(node, f"_saved_{name}") for name in names]
    except RuntimeError:  # a backward pass has freed them
        return None
    return None if any(k is None for k in kept) else (function(node), kept)


def _activation_hooks(model: nn.Module, group: NeuronGroup, views: _Views, bias: bool) -> list[Any]:
    """Scale a group where its activations pass: a norm's own scale, a layer's input, or a layer's output.

    Where a layer does not run itself, no activation passes a hook: its weight is scaled while its caller runs.
    """
    module = model.get_submodule(group.module)
    if group.caller is not None or get_tensor(model, group.gate.param).dim() == 1:
        runs = module if group.caller is None else model.get_submodule(group.caller)
        return _swap_hooks(runs, module, _parts(group, bias), lambda: views()[group.name])
    axis = 1 if _is_conv(module) else -1

    def gate(x: Tensor) -> Tensor:
        return _product(x, shaped(spread(views()[group.name], group.gate).to(x.device, x.dtype), x.dim(), axis))

    if group.role != "head":
        return [module.register_forward_pre_hook(lambda _, inputs: (gate(inputs[0]), *inputs[1:]))]

    def outputs(m: nn.Module, _: tuple, out: Tensor) -> Tensor:
        if bias or m.bias is None:
            return gate(out)
        shift = shaped(get_tensor(m, "bias"), out.dim(), axis)
        return gate(out - shift) + shift

    return [module.register_forward_hook(outputs)]


def _unsaved(_: nn.Module, state: dict[str, Any], prefix: str, __: dict) -> None:
    state.pop(prefix + MASK_NAME, None)


def _is_conv(module: nn.Module) -> bool:
    return hasattr(module, "in_channels")


@contextlib.contextmanager
def masked(model: nn.Module, index: NeuronIndex, mask: Tensor, level: str = "activation", bias: bool = False) -> Iterator[Tensor]:
    """Run `model` with its neurons scaled by `mask`; nothing is left behind, also after an exception.

    A mask that requires a gradient is registered as a parameter at the root of the model while the context is open
    (data parallel wrappers look for it there), and the gradient arrives in `mask.grad`.

    Args:
        model: any network that `index` was made for.
        index: the neurons to scale; a selection is enough.
        mask: `(N,)`, 1 = keep.
        level: `activation` needs no weight gradient and costs little; `weight` multiplies the weights themselves through
            `torch.nn.utils.parametrize`: general, as dear as fine-tuning. Groups with a `caller` are scaled in their weights at both.
        bias: scale the bias of the gate's module too.

    Raises:
        IndexMismatch: the mask is not `(N,)`.
        ConfigError: an unknown level, or that of weights on a model that is spread over processes.
    """
    if level not in ("activation", "weight"):
        raise ConfigError(f"level must be 'activation' or 'weight', got '{level}'")
    if level == "weight" and is_sharded(model):
        raise ConfigError("the model is spread over processes (FSDP), where masks act on activations alone: leave level='weight' out")
    index.check(mask)
    if mask.requires_grad and not isinstance(mask, nn.Parameter):
        raise ConfigError("a mask that is learned must be an nn.Parameter")
    views = _Views(index, mask)
    handles: list[Any] = []
    parametrized: list[tuple[nn.Module, str]] = []
    stores: list[dict[str, Any]] = [kept for m in model.modules() for kept in (m._parameters, m._buffers)] if level == "weight" else []
    orders = [list(kept) for kept in stores]
    try:
        if isinstance(mask, nn.Parameter):
            model.register_parameter(MASK_NAME, mask)
            # not saved: a checkpoint written inside the context has the keys of the model itself
            handles.append(model.register_state_dict_post_hook(_unsaved))
        handles.append(model.register_forward_pre_hook(views.refresh))
        for group in index:
            if level == "activation":
                handles += _activation_hooks(model, group, views, bias)
                continue
            for part in _parts(group, bias):
                module, leaf = model.get_submodule(group.module), part.param.rpartition(".")[2]
                parametrize.register_parametrization(module, leaf, _Scale(views, group.name, part), unsafe=True)
                parametrized.append((module, leaf))
        yield mask
    finally:
        for handle in reversed(handles):
            handle.remove()
        model._parameters.pop(MASK_NAME, None)
        for module, leaf in parametrized:
            if parametrize.is_parametrized(module, leaf):
                parametrize.remove_parametrizations(module, leaf, leave_parametrized=False)
        for kept, order in zip(stores, orders, strict=True):  # removal moves a parameter to the end
            if set(order) == set(kept) and order != list(kept):
                kept.update({k: kept.pop(k) for k in order})


@torch.no_grad()
def bake(model: nn.Module, index: NeuronIndex, mask: Tensor, bias: bool = False) -> nn.Module:
    """Fold a mask into the weights, in place: same keys, order, dtypes and ties; equal to the masked model.

    Neurons whose mask is exactly 1 keep their weights bit for bit.
    """
    index.check(mask)
    for group, part in ((g, p) for g in index for p in _parts(g, bias)):
        weight = get_tensor(model, part.param)
        multiply_(weight, spread(index.split(mask)[group.name], part), part.axis, part.start)
    return model


def save_mask(path: str | Path, index: NeuronIndex, mask: Tensor, extra: dict[str, Tensor] | None = None, complete: bool = True) -> None:
    """Write a mask with its index's fingerprint, one tensor per group, keyed by checkpoint key and axis.

    Args:
        extra: tensors that the repair replaced besides (running statistics of norms), by checkpoint key.
        complete: base weights, mask and `extra` together are the whole repair.
    """
    tensors = {_key(index, g): part.detach().float().cpu().clone() for g, part in zip(index, mask.split(index.sizes), strict=True)}
    tensors |= {f"replaced/{k}": v.detach().cpu().clone() for k, v in (extra or {}).items()}
    names = {_key(index, g): g.name for g in index}
    slices = {_key(index, g): [index.keys.get(g.gate.param, g.gate.param), *g.gate[1:]] for g in index}
    meta = {"format": FORMAT, "fingerprint": index.fingerprint(), "complete": json.dumps(complete), "modules": json.dumps(names)}
    save_file(tensors, path, metadata=meta | {"slices": json.dumps(slices)})


def _key(index: NeuronIndex, group: NeuronGroup) -> str:
    gate = group.gate
    return f"mask/{index.keys.get(gate.param, gate.param)}/{gate.axis}"


def load_mask(path: str | Path, index: NeuronIndex) -> tuple[Tensor, dict[str, Tensor], bool]:
    """Read `(mask (N,), replaced tensors, complete)`; neurons that the file does not name keep mask 1.

    Raises:
        IndexMismatch: the file names neurons that this model has not, or of another size.
    """
    with safe_open(path, framework="pt") as file:
        meta = file.metadata() or {}
        stored = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - not a mapping
    if meta.get("format") != FORMAT:
        raise IndexMismatch(f"{path} is no neuron mask: expected format '{FORMAT}', got '{meta.get('format')}'")
    masks = {k: v for k, v in stored.items() if k.startswith("mask/")}
    known = {_key(index, g): g for g in index}
    strange = sorted(set(masks) - set(known)) + sorted(k for k in set(masks) & set(known) if masks[k].shape != (known[k].size,))
    if strange:
        raise IndexMismatch(
            f"the mask belongs to another model: {len(strange)} of {len(masks)} groups do not match, first "
            f"'{strange[0].removeprefix('mask/')}'; expected neurons with fingerprint {index.fingerprint()}, got {meta.get('fingerprint')}"
        )
    flat = torch.cat([masks.get(_key(index, g), torch.ones(g.size)) for g in index])
    extra = {k.removeprefix("replaced/"): v for k, v in stored.items() if k.startswith("replaced/")}
    return flat, extra, bool(json.loads(meta.get("complete", "false")))
