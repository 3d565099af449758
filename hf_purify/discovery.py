"""Find the neurons of any network from its structure alone: no list of class names or module names.

One forward pass is traced (`tracing`). How the channels of a layer's input arrive tells what the input is:

- channel by channel, from one layer or from a gate and an up projection: **hidden units**, also where each channel arrives as
  a run of inputs, as from the flattened maps of a convolution;
- channel by channel from the values, across channels from queries and keys: the value channels of an **attention**;
- fed by a norm, by several residual writers, by an embedding or by the model's input: no neurons of its own.

An attention neuron is one input channel of the output projection. It owns the row of the values too, where the values are as many
and lie in the same order. Where they are shared by several heads (grouped queries), or interleaved with queries and keys in one
projection, it owns its column alone: a row of the values then belongs to more than one neuron, or to none by a plain offset.

Affine norms are neurons too (one scale per channel), together with the filter in front of them where there is one; not so a norm
whose channels stay when its weight is zero, as where the scale is one plus the weight. Parameters that several modules hold, as
an embedding and the head tied to it, are no neurons; a module that runs several times is, if every run finds the same ones.

A neuron of a layer that does not run itself knows who called it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from hf_purify.errors import ModelError
from hf_purify.neurons import NeuronGroup, NeuronIndex, ParamSlice
from hf_purify.sharding import is_sharded
from hf_purify.tracing import Call, Feed, Tracer
from hf_purify.twins import index_by_twin


def _blocks(names: list[str], model: nn.Module) -> list[int]:
    """Number the containers of modules in order of execution: `layer1.0.bn1` and `layer1.0.bn2` share a block.

    A container is the part of a name up to the last numbered component that is followed by more; without one it is the stem, 0.
    Members of a list inside another container are parts of it where each is of another class: T5's attention and perceptron.
    """
    parted = {n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and 1 < len({type(c) for c in m}) == len(m)}
    seen: dict[str, int] = {}
    numbers = []
    for name in names:
        parts = name.split(".")
        found = [i for i, p in enumerate(parts[:-1]) if p[-1:].isdigit()]
        while len(found) > 1 and ".".join(parts[: found[-1]]) in parted:
            found.pop()
        prefix = ".".join(parts[: found[-1] + 1]) if found else ""
        numbers.append(0 if not prefix else seen.setdefault(prefix, len(seen) + 1))
    return numbers


def _numbered(groups: Iterable[NeuronGroup], model: nn.Module) -> NeuronIndex:
    """An index of groups that know their blocks."""
    found = list(groups)
    blocks = _blocks([g.name for g in found], model)
    return NeuronIndex(tuple(dataclasses.replace(g, block=b) for g, b in zip(found, blocks, strict=True)))


def _slices(call: Call, offset: int) -> list[ParamSlice]:
    """What a layer's output channels own, from `offset` on: weight rows, and the bias."""
    return [ParamSlice(p.param, p.axis, p.start + offset) for p in call.rows]


def _norm_group(call: Call) -> NeuronGroup:
    params = _slices(call, 0)
    if len(call.feeds) == 1 and call.feeds[0].complete and call.feeds[0].offsets == (0,):
        producer = call.feeds[0].call
        if not producer.norm and producer.output.numel() == call.output.numel():
            params += _slices(producer, 0)  # the filter in front of the norm
    return NeuronGroup(call.name, call.size, tuple(params), "norm")


def _input_group(call: Call) -> NeuronGroup | None:
    """Hidden units or attention values at the input of a layer, where there are any."""
    if call.inputs is None or not call.feeds or any(f.call.embeds or f.call.writes for f in call.feeds):
        return None
    axis, size = call.inputs
    if call.mixes:
        return NeuronGroup(call.name, size, (ParamSlice(call.rows[0].param, axis),), "attention", caller=call.caller)
    width = min((f.width for f in call.feeds if f.offsets), default=1)
    feeds = [f if f.width == width else Feed(f.call, (), False) for f in call.feeds]  # a gate over runs of channels is no owner
    if any(f.call.norm and not f.call.adds and f.offsets for f in feeds):
        return None  # the norm in front has these neurons already
    if not any(f.offsets for f in feeds) and len(feeds) > 1:
        return None
    attention = not all(f.complete for f in feeds) and any(f.offsets for f in feeds)
    if not attention and any(f.call.source is not feeds[0].call.source for f in feeds):
        return None  # several writers of a residual stream, which all later layers read
    rows = [s for f in feeds for offset in f.offsets for s in _rows(f.call, offset)]
    gate = ParamSlice(call.rows[0].param, axis, 0, width)
    return NeuronGroup(call.name, size // width, (gate, *rows), "attention" if attention else "hidden", caller=call.caller)


def _rows(call: Call, offset: int) -> list[ParamSlice]:
    """What a producer owns; of a response norm, also what the layer in front of it owns."""
    front = call.feeds[0] if call.adds and len(call.feeds) == 1 and call.feeds[0].complete else None
    return _slices(call, offset) + ([s for o in front.offsets for s in _slices(front.call, o)] if front else [])


def _groups(runs: list[Call], head: Call | None) -> list[NeuronGroup]:
    """The neurons that the runs of a layer stand for: none, one group, or hidden inputs and the class rows of a head."""
    call = runs[0]
    if call.norm:
        return [_norm_group(call)] if call.is_norm else []
    inputs = [_input_group(c) for c in runs]
    found = [g for g in inputs[:1] if g and all(i and i.gate == g.gate for i in inputs)]
    if call is head:
        name = f"{call.name}[out]" if found else call.name
        found.append(NeuronGroup(name, call.size, tuple(_slices(call, 0)), "head", caller=call.caller))
    return found


def discover(model: nn.Module, forward: Callable[[nn.Module], Tensor], classes: int | None = None) -> NeuronIndex:
    """Trace one forward pass and return the index of all neurons, in order of execution.

    Args:
        model: any network; put into eval mode for the trace and back after it.
        forward: runs the model on a small random input and returns its logits.
        classes: number of classes; the last weight layer with that many outputs becomes the group of role `head`. None for a
            language model: its vocabulary is no set of classes.

    Raises:
        ModelError: no group was found, or the model is spread over processes and its neurons cannot be told from a part of it.
    """
    if is_sharded(model):
        found = index_by_twin(model, lambda twin: discover(twin, forward, classes))
        blocks = _blocks([g.name for g in found], model)
        return NeuronIndex(tuple(dataclasses.replace(g, block=b) for g, b in zip(found, blocks, strict=True)))
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        with torch.enable_grad(), Tracer(model) as tracer:
            forward(model)
    finally:
        for module, mode in modes.items():
            module.training = mode
    for call in tracer.calls:
        writers = [f.call for f in call.feeds if f.complete] if call.norm else []
        if any(w.source is not writers[0].source for w in writers):
            for writer in writers:
                writer.writes = True
    layers: dict[tuple, list[Call]] = {}  # a shared layer counts once, where it runs last
    for call in reversed(tracer.calls):
        if not call.embeds:
            layers.setdefault((call.name, call.rows), []).insert(0, call)
    head = next((r[0] for r in layers.values() if not r[0].norm and r[0].size == classes), None)
    groups = [g for r in reversed(layers.values()) for g in _groups(r, head)]
    if not groups:
        raise ModelError("no neurons found: the model has no affine norm and no hidden layer that could be masked")
    return _numbered(groups, model)
