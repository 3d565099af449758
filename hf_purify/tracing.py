"""Trace one forward pass of a network: which layers and norms ran, and how the channels of each one's input arrive.

The output of every weight layer and norm is cut out of the autograd graph, so that a gradient taken at the input of the next layer
reaches exactly the layers that feed it directly. Which of their channels that gradient touches tells how they arrive.

A layer is a module that runs, or a call of `F.linear` on a parameter that some other module holds: `nn.MultiheadAttention` never
runs its `out_proj`, and keeps queries, keys and values in one parameter.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_purify.neurons import ParamSlice, get_tensor

CHECKS = 8  # more random halves of the channels: with few channels one alone may agree by chance


@dataclass
class Feed:
    """A layer that feeds another one directly."""

    call: Call
    offsets: tuple[int, ...]  # where chunks of channels begin that arrive channel by channel
    complete: bool  # every chunk does
    width: int = 1  # inputs that each channel arrives as


@dataclass
class Call:
    """What one traced layer or norm saw and gave."""

    name: str  # of the module; of the parameter where that is not a `weight`
    rows: tuple[ParamSlice, ...]  # what output channel 0 owns: of the weight, and of the bias
    size: int  # output channels
    inputs: tuple[int, int] | None  # axis of the weight that holds input channels, and how many
    channel: int  # axis of the output that holds channels
    output: Tensor
    norm: bool = False
    scales: bool = True  # its channels vanish with its weight and bias
    adds: bool = False  # without them it gives its input back: a response norm
    mixes: bool = False  # each channel of its input has values of its own, and shares with its neighbours what weighs them
    writes: bool = False  # a norm reads its output added to that of a layer somewhere else: a residual stream
    caller: str | None = None  # the module that used the weight, where its own did not run
    source: Tensor | None = None
    feeds: list[Feed] = field(default_factory=list)

    @property
    def is_norm(self) -> bool:
        return self.norm and self.scales

    @property
    def embeds(self) -> bool:
        """An embedding: it writes to the residual stream, and has no neurons."""
        return not self.rows


def _weight(module: nn.Module) -> Tensor:
    """The weight of a traced module."""
    return get_tensor(module, "weight")


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return "Norm" in type(module).__name__ and isinstance(weight, Tensor) and weight.dim() == 1


def _wraps(module: nn.Module) -> bool:
    """Does a module show the weight of one inside it as its own? A layer of PEFT does; the one inside is traced."""
    return any(getattr(m, "weight", None) is module.weight for m in module.modules() if m is not module)


def axes(module: nn.Module) -> tuple[int, int] | None:
    """Return `(output axis, input axis)` of a linear or convolutional layer's weight, else None.

    Recognised by shape: a float weight of at least two dimensions, with the sizes that the layer itself states. Input channels of
    a grouped convolution are shared out over groups and have no axis of their own: the input axis is then -1.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() < 2 or isinstance(module, nn.Embedding):
        return None
    if hasattr(module, "nf") and weight.dim() == 2:  # transformers' Conv1D: (in, out)
        return 1, 0
    if getattr(module, "transposed", False):
        return (1, 0) if module.groups == 1 else None
    if hasattr(module, "in_features") or hasattr(module, "in_channels"):
        return 0, (1 if getattr(module, "groups", 1) == 1 else -1)
    return None


def _channel_axis(module: nn.Module, tensor: Tensor) -> int:
    """The axis of an activation that holds channels: 1 for convolutions and batch norms, the last elsewhere."""
    weight = _weight(module)
    kind = type(module).__name__
    first = "BatchNorm" in kind or "GroupNorm" in kind or "Norm2d" in kind or getattr(module, "data_format", "") == "channels_first"
    spatial = hasattr(module, "in_channels") or first
    channels = weight.shape[0] if weight.dim() == 1 else None
    if channels is not None and not spatial:
        return 1 if tensor.dim() == 4 and tensor.shape[-1] != channels and tensor.shape[1] == channels else tensor.dim() - 1
    return 1 if spatial else tensor.dim() - 1


class Tracer:
    """Hooks that record weight layers and norms in order of execution; a context manager that leaves none behind."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.calls: list[Call] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._generator = torch.Generator().manual_seed(0)
        self._probing = False
        self._running: list[str] = []  # modules whose forward has begun and not ended
        self._names = {id(p): n for n, p in model.named_parameters()}
        holders = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
        self._tied = {p for p, count in holders.items() if count > 1}
        self._layers: set[str] = set()
        self._linear = F.linear
        self._fused = torch.backends.mha.get_fastpath_enabled()

    def __enter__(self) -> Tracer:
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Embedding):
                self._handles.append(module.register_forward_hook(self._embedding(name)))
            elif (_is_norm(module) or axes(module) is not None) and not _wraps(module):
                self._layers.add(name)
                self._handles.append(module.register_forward_hook(self._hook(name)))
            self._handles.append(module.register_forward_pre_hook(lambda *_, name=name: self._running.append(name)))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        F.linear = self._functional  # no hook sees a call of a function
        torch.backends.mha.set_fastpath_enabled(False)  # one kernel for a whole attention, with no layers in it
        return self

    def __exit__(self, *exc: object) -> None:
        F.linear = self._linear
        torch.backends.mha.set_fastpath_enabled(self._fused)
        for handle in self._handles:
            handle.remove()

    def _leave(self, *_: object) -> None:
        self._running.pop()

    def _hook(self, name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: object) -> object:
            if not inputs or not isinstance(inputs[0], Tensor) or not isinstance(output, Tensor):
                return None
            if self._probing:
                return None
            norm, weight = _is_norm(module), _weight(module)
            if id(weight) in self._tied:
                return None  # a tied head: to mask it would mask the embedding
            out_axis, in_axis = axes(module) or (0, -1)
            rows = [ParamSlice(f"{name}.weight", out_axis)]
            if isinstance(getattr(module, "bias", None), Tensor):
                rows.append(ParamSlice(f"{name}.bias", 0))
            rest = self._at_zero(module, inputs) if norm else None
            scales = rest is None or not rest.any()
            call = Call(
                name,
                tuple(rows),
                size=weight.shape[out_axis],
                inputs=(in_axis, weight.shape[in_axis]) if in_axis >= 0 else None,
                channel=_channel_axis(module, output),
                output=output.detach().requires_grad_(),
                norm=norm,
                scales=scales,
                adds=rest is not None and not scales and torch.equal(rest, inputs[0].to(rest.dtype)),
            )
            return self._record(call, inputs[0], _channel_axis(module, inputs[0]))

        return hook

    def _embedding(self, name: str) -> Callable:
        def hook(module: nn.Embedding, _: tuple, output: object) -> object:
            if not isinstance(output, Tensor):
                return None
            source = output.detach().requires_grad_()
            self.calls.append(Call(name, (), module.embedding_dim, None, output.dim() - 1, source))
            return source.clone()

        return hook

    def _functional(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`F.linear`, recorded if the weight is a parameter of the model, or a run of its rows, and no recorded layer is running."""
        output = self._linear(input, weight, bias)
        found = self._address(weight)
        if found is None or not self._running or self._running[-1] in self._layers:
            return output
        param, start = found
        owner, _, leaf = param.rpartition(".")
        if id(weight) in self._tied or isinstance(self.model.get_submodule(owner), nn.Embedding):
            return output  # a tied head, as above
        shift = self._address(bias) if bias is not None else None
        call = Call(
            owner if owner and leaf == "weight" else param,
            (ParamSlice(param, 0, start), *([ParamSlice(shift[0], 0, shift[1])] if shift else [])),
            size=weight.shape[0],
            inputs=(1, weight.shape[1]) if id(weight) in self._names else None,
            channel=output.dim() - 1,
            output=output.detach().requires_grad_(),
            caller=self._running[-1],
        )
        return self._record(call, input, input.dim() - 1)

    def _address(self, tensor: Tensor) -> tuple[str, int] | None:
        """The parameter that a tensor is, and 0; or the one that it is a run of rows of, and the first row."""
        if id(tensor) in self._names:
            return self._names[id(tensor)], 0
        base = tensor._base
        if base is None or id(base) not in self._names or tensor.shape[1:] != base.shape[1:] or tensor.stride() != base.stride():
            return None
        return self._names[id(base)], int(tensor.storage_offset() - base.storage_offset()) // int(base.stride(0))

    def _record(self, call: Call, x: Tensor, channel: int) -> Tensor:
        """Note a call with what feeds the channels of its input, on axis `channel`; give its output, cut out of the graph."""
        call.source, call.feeds = x, self._feeds(x, channel, wide=not call.norm)
        if call.inputs and call.feeds and not any(f.offsets for f in call.feeds):
            call.mixes = self._mixes(x.movedim(channel, -1), [f.call for f in call.feeds])
        self.calls.append(call)
        return call.output.clone()  # activations may work in place

    def _at_zero(self, module: nn.Module, inputs: tuple) -> Tensor:
        """A norm's output where its weight and bias are zero."""
        zeros = {n: torch.zeros_like(t) for n in ("weight", "bias") if isinstance(t := getattr(module, n, None), Tensor)}
        self._probing = True
        try:
            with torch.no_grad():
                return torch.func.functional_call(module, zeros, inputs)
        finally:
            self._probing = False

    def _feeds(self, x: Tensor, channel: int, wide: bool) -> list[Feed]:
        """The earlier calls that feed `x` directly, and how their channels arrive on axis `channel`, also as runs if `wide`."""
        if not x.requires_grad or not self.calls:
            return []
        moved = x.movedim(channel, -1)
        size = moved.shape[-1]
        chosen = torch.rand(size, generator=self._generator) < 0.5
        chosen[int(torch.randint(size, (1,), generator=self._generator))] = True
        grads = self._gradients(moved, chosen, self.calls)
        feeds = [_feed(c, g, chosen.to(x.device)) for c, g in zip(self.calls, grads, strict=True) if g is not None]
        # an embedding that is no token's own, as of positions, is a shift like a bias
        feeds = [f for f in feeds if not f.call.embeds or (f.complete and f.call.output.numel() == x.numel())]
        return [self._wide(f, moved) if wide and not f.offsets else f for f in feeds]

    def _gradients(self, moved: Tensor, chosen: Tensor, calls: list[Call]) -> tuple[Tensor | None, ...]:
        """Gradients of a random positive combination of the chosen channels of an input, channels last, at the calls' outputs."""
        weights = torch.rand(moved.shape, generator=self._generator) + 0.5
        probe = (moved * (chosen * weights).to(moved)).sum()
        return torch.autograd.grad(probe, [c.output for c in calls], allow_unused=True, retain_graph=True)

    def _mixes(self, moved: Tensor, calls: list[Call]) -> bool:
        """Does a channel of an input, channels last, reach some of the calls' channels alone, and others with its neighbours?"""
        places = torch.arange(moved.shape[-1])
        distance = (places - len(places) // 2).abs()  # from the channel in the middle
        state = self._generator.get_state()
        own, near = (self._gradients(moved, distance == d, calls) for d in (0, 1))
        self._generator.set_state(state)  # what is drawn for the other layers stays as it is
        pairs = [(_touched(c, a), _touched(c, b)) for c, a, b in zip(calls, own, near, strict=True) if a is not None and b is not None]
        return any(bool((a & ~b).any()) for a, b in pairs) and any(bool((a & b).any()) for a, b in pairs)

    def _wide(self, feed: Feed, moved: Tensor) -> Feed:
        """The same feed, if each of its channels arrives as a run of inputs: the columns of a flattened map."""
        channels = feed.call.size
        width, rest = divmod(moved.shape[-1], channels)
        if rest or width < 2 or channels < 2:  # a single channel touches itself alone, whatever its way
            return feed
        found = self._in_runs(feed, moved, width)
        state = self._generator.get_state()
        again = [self._in_runs(feed, moved, width) for _ in range(CHECKS if found.complete else 0)]
        self._generator.set_state(state)  # what is drawn for the other layers stays as it is
        return dataclasses.replace(found, width=width) if found.complete and all(f.complete for f in again) else feed

    def _in_runs(self, feed: Feed, moved: Tensor, width: int) -> Feed:
        """How channels arrive if each is a run of inputs, judged by a random half of them."""
        chosen = torch.zeros(feed.call.size, dtype=torch.bool)
        chosen[torch.randperm(feed.call.size, generator=self._generator)[: feed.call.size // 2]] = True
        (grad,) = self._gradients(moved, chosen.repeat_interleave(width), [feed.call])
        return _feed(feed.call, grad, chosen.to(moved.device)) if grad is not None else Feed(feed.call, (), False)


def _touched(call: Call, grad: Tensor) -> Tensor:
    """The channels of a call's output that a gradient touches."""
    moved = grad.movedim(call.channel, -1)
    return moved.reshape(-1, moved.shape[-1]).abs().sum(0) > 0


def _feed(call: Call, grad: Tensor, chosen: Tensor) -> Feed:
    """Compare the channels that a gradient touches with those chosen at the other end.

    A fused projection (QKV, gate and up) is several chunks wide; each is judged by itself.
    """
    touched, size = _touched(call, grad), chosen.numel()
    if touched.numel() % size:
        return Feed(call, (), False)
    aligned = [bool(t.any() and not (t & ~chosen).any()) for t in touched.split(size)]
    return Feed(call, tuple(i * size for i, ok in enumerate(aligned) if ok), all(aligned))
