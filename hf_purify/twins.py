"""Small whole networks in which the neurons of one that cannot be traced are found: its parameters are spread over processes, or hold no values.

- A twin has three layers of full width: the first, one in the middle, and the last. What is found in it stands for the model's layers,
  after their parameters were held against the twin's, name by name and shape by shape. Its groups are whole: a repair works on them.
- A narrow network has all layers and few channels, and takes no memory to speak of. Its groups are given the sizes of the wide network's,
  and own no more than what a mask scales: enough to count.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from hf_purify.errors import ModelError
from hf_purify.neurons import NeuronGroup, NeuronIndex, get_tensor

LAYERS = 3


def twin_of(model: Any) -> nn.Module:
    """A model of the same class and config with three layers and random weights, whole, on the model's device, in eval mode.

    Raises:
        ModelError: its config does not say how many layers it has, or has several stacks of them.
    """
    config: Any = copy.deepcopy(getattr(model, "config", None))
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(layers, int) or getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{type(model).__name__} is spread over processes, and its neurons cannot be told from a part of it: that takes one stack of like layers"
        )
    config.num_hidden_layers = min(LAYERS, layers)
    for name, value in vars(config).items():  # one entry a layer, such as its kind of attention
        if isinstance(value, list) and len(value) == layers > LAYERS:
            setattr(config, name, [value[0], value[1], value[-1]])
    config.distributed_config = None
    kind = next(k for k in type(model).__mro__ if not k.__name__.startswith("FSDP"))
    with torch.random.fork_rng(), torch.device(next(model.parameters()).device):
        torch.manual_seed(0)
        return kind(config).eval()


def index_by_twin(model: nn.Module, trace: Callable[[nn.Module], NeuronIndex]) -> NeuronIndex:
    """The index of a model as traced on its twin: groups of the middle layer stand for those of all layers between the first and the last.

    Args:
        trace: gives the index of a whole model.

    Raises:
        ModelError: there is no twin, or some layer has other parameters than the twin's.
    """
    twin = twin_of(model)
    found, own = trace(twin), _layers(model)
    theirs = _layers(twin)
    if not own or not theirs:
        raise ModelError(f"{type(model).__name__} has no stack of layers that its neurons could be told from")
    stack = next(iter(own)).rpartition(".")[0]
    named = {name: [g for g in found if g.name == name or g.name.startswith(f"{name}.")] for name in theirs}
    before = [g for g in found if not any(g in groups for groups in named.values())]
    last = found.groups.index(named[next(reversed(theirs))][-1])
    parts: list[NeuronGroup] = [g for g in before if found.groups.index(g) < last]
    for i, (name, shapes) in enumerate(own.items()):
        source = f"{stack}.{0 if i == 0 else len(theirs) - 1 if i == len(own) - 1 else 1}"
        if shapes != theirs[source]:
            unlike = sorted(set(shapes.items()) ^ set(theirs[source].items()))[0][0]
            raise ModelError(
                f"the layer '{name}' is not like '{source}' ({unlike}): the neurons of such a model cannot be told from a part of it"
            )
        parts += [_moved(g, source, name) for g in named[source]]
    parts += [g for g in before if found.groups.index(g) > last]
    return NeuronIndex(tuple(parts), found.keys)


def _layers(model: nn.Module) -> dict[str, dict[str, tuple[int, ...]]]:
    """Name of each layer of the stack -> shapes of its parameters, by their names within it."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found = {n: m for n, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer) and re.search(r"\.\d+$", n)}
    return {name: {n: tuple(p.shape) for n, p in m.named_parameters()} for name, m in found.items()}


def _moved(group: NeuronGroup, source: str, name: str) -> NeuronGroup:
    """A group of one layer as that of another."""

    def moved(text: str) -> str:
        return name + text[len(source) :] if text.startswith(f"{source}.") else text

    params = tuple(p._replace(param=moved(p.param)) for p in group.params)
    return dataclasses.replace(group, name=moved(group.name), params=params, caller=group.caller and moved(group.caller))


def narrow(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a network with the same layers and few channels: heads are shared out among keys and values as they were.

    Raises:
        ModelError: the config has no heads and no width.
    """
    from transformers import CONFIG_MAPPING

    parsed: Any = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    heads, width = (getattr(parsed, n, None) for n in ("num_attention_heads", "hidden_size"))
    if not isinstance(heads, int) or not isinstance(width, int):
        raise ModelError(
            f"a model of type '{parsed.model_type}' with so many parameters cannot be estimated: its config has no hidden_size and heads"
        )
    groups = getattr(parsed, "num_key_value_heads", None) or heads
    few = {"num_key_value_heads": min(2, groups), "num_attention_heads": 2 if groups in (1, heads) else 4, "head_dim": 8}
    inner = ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size", "encoder_ffn_dim", "decoder_ffn_dim")
    few |= dict.fromkeys(inner, 72) | {"d_kv": 8, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    few |= dict.fromkeys(("hidden_size", "word_embed_proj_dim"), 8 * few["num_attention_heads"])
    changed = {n: v for n, v in few.items() if getattr(parsed, n, None) is not None}
    own = getattr(parsed, "attribute_map", {})
    return {**parsed.to_dict(), **{own.get(n, n): v for n, v in changed.items()}, "architectures": config.get("architectures")}


def widened(group: NeuronGroup, network: nn.Module) -> NeuronGroup:
    """A group of the narrow network in the wide one: of what it owns only the gate and its bias are told."""
    gate = group.gate
    if gate.start or gate.width > 1:
        raise ModelError(f"the neurons of '{group.name}' share a parameter with others, and cannot be counted without the model's weights")
    kept = (gate, *([group.bias] if group.bias else []))
    return dataclasses.replace(group, size=get_tensor(network, gate.param).shape[gate.axis], params=kept)
