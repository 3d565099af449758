"""Discovery on language models of transformers: classifiers, decoders, and encoders with decoders; and the masks on what it finds."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from text_families import CLASSES, FAMILIES, forward
from torch import Tensor, nn

from hf_purify.discovery import discover
from hf_purify.masks import bake, masked
from hf_purify.neurons import NeuronGroup, NeuronIndex, get_tensor, owned

LEVELS = ("activation", "weight")
ROLES = ("hidden", "attention", "norm", "head")
families = pytest.mark.parametrize("name", FAMILIES)


def find(name: str, model: nn.Module, run: Callable[[nn.Module], Tensor] = forward) -> NeuronIndex:
    return discover(model, run, FAMILIES[name].classes)


class Bench:
    """A model with its index and a random mask; no weight, shift or scale of it is near zero, which would hide what lies behind."""

    def __init__(self, name: str) -> None:
        self.model = FAMILIES[name].make().requires_grad_(False)
        self.index = find(name, self.model)
        generator = torch.Generator().manual_seed(1)
        for n, p in self.model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise if n.endswith("bias") else 0.2 * noise + (1 if p.dim() == 1 else 0))
        self.mask = torch.rand(len(self.index), generator=generator)
        self.mask[::5] = 0
        self.mask[1::5] = 1
        self.plain = forward(self.model)


@functools.cache  # masks leave nothing behind
def bench(name: str) -> Bench:
    return Bench(name)


def group(name: str, module: str) -> NeuronGroup:
    (found,) = (g for g in bench(name).index if g.name == module)
    return found


def owns(name: str, module: str) -> list[tuple]:
    """What a neuron owns: parameter, axis and start; names from the module's last dot but one on."""
    assert all(p.width == 1 for p in group(name, module).params)
    return [(".".join(p.param.split(".")[-2:]), p.axis, p.start) for p in group(name, module).params]


@families
def test_groups(name: str) -> None:
    family, index = FAMILIES[name], bench(name).index
    assert {role: index.where(role=role).sizes for role in ROLES} == family.expected
    assert {g.role for g in index} <= set(ROLES)
    assert len({g.name for g in index}) == len(index.groups)
    for found in index:
        for part in found.params:
            assert part.start + found.size <= get_tensor(bench(name).model, part.param).shape[part.axis], (found.name, part)


@families
def test_blocks_are_layers(name: str) -> None:
    family, index = FAMILIES[name], bench(name).index
    assert list(dict.fromkeys(b for b in (g.block for g in index) if b)) == list(range(1, family.blocks + 1))
    inside = index.where(blocks=True)
    assert {g.role for g in inside} == {"hidden", "attention", "norm"} - (set() if family.norm else {"norm"})
    assert sum(g.role == "attention" for g in inside) == len(family.attention)
    stem = [g for g in index if g.block == 0]
    assert all(g.role in ("norm", "head") or g.name.startswith("class") or g.module.endswith("out_proj") for g in stem)


@families
def test_tied_weights_and_the_embedding_are_no_neurons(name: str) -> None:
    model = bench(name).model
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    output = model.get_output_embeddings()
    tables |= {id(output.weight)} if output is not None else set()
    assert not [p.param for g in bench(name).index for p in g.params if id(get_tensor(model, p.param)) in tables]


@families
def test_norms_of_the_residual_stream_own_no_layer(name: str) -> None:
    norms = bench(name).index.where(role="norm")
    owners = {(g.name, p.param.rpartition(".")[0]) for g in norms for p in g.params}
    assert {norm: layer for norm, layer in owners if layer != norm} == FAMILIES[name].fronts


@families
@pytest.mark.parametrize("bias", [False, True])
def test_both_levels_and_the_baked_model_agree(name: str, bias: bool) -> None:
    at = bench(name)
    found = {}
    with torch.no_grad():
        for level in LEVELS:
            with masked(at.model, at.index, at.mask, level=level, bias=bias):
                found[level] = forward(at.model)
        baked = forward(bake(copy.deepcopy(at.model), at.index, at.mask, bias=bias))
        assert torch.equal(forward(at.model), at.plain)
    assert not torch.allclose(at.plain, baked, atol=1e-3)
    torch.testing.assert_close(found["activation"], found["weight"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["activation"], baked, atol=1e-5, rtol=1e-5)


@families
def test_each_group_moves_the_output(name: str) -> None:
    at = bench(name)
    with torch.no_grad():
        for found in at.index:
            part = NeuronIndex((found,))
            with masked(at.model, part, torch.zeros(len(part))):
                assert not torch.allclose(forward(at.model), at.plain, atol=1e-4), found.name


@families
def test_what_a_unit_owns_in_front_of_its_gate_removes_it_too(name: str) -> None:
    """A hidden unit whose rows are zero is zero, and so is a value channel; queries, keys or another order would show."""
    at = bench(name)
    for found in at.index.where(role=("hidden", "attention")):
        mask = (torch.arange(found.size) % 3 != 1).float()
        other = copy.deepcopy(at.model)
        for part in found.params[1:]:
            owned(get_tensor(other, part.param), part, found.size)[mask == 0] = 0
        with torch.no_grad(), masked(at.model, NeuronIndex((found,)), mask):
            if len(found.params) > 1:
                torch.testing.assert_close(forward(other), forward(at.model), atol=1e-5, rtol=1e-5)
            assert len(found.params) > 1 or found.role == "attention"


@families
def test_mask_of_ones_changes_no_bit(name: str) -> None:
    at = bench(name)
    ones = torch.ones(len(at.index))
    for bias in (False, True):
        for level in LEVELS:
            with torch.no_grad(), masked(at.model, at.index, ones, level=level, bias=bias):
                assert torch.equal(forward(at.model), at.plain), (level, bias)
        baked = bake(copy.deepcopy(at.model), at.index, ones, bias=bias).state_dict()
        assert all(torch.equal(baked[k], v) for k, v in at.model.state_dict().items())


@families
def test_mask_gradients_agree(name: str) -> None:
    at = bench(name)
    weights = torch.randn(at.plain.shape, generator=torch.Generator().manual_seed(2))
    grads = []
    for level in LEVELS:
        mask = nn.Parameter(at.mask.clamp(0.1, 0.9))
        with masked(at.model, at.index, mask, level=level):
            (forward(at.model) * weights).sum().backward()
        grads.append(mask.grad)
    assert all(part.abs().max() > 1e-4 for part in at.index.split(grads[0]).values())
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-3)


@families
def test_index_is_the_same_for_other_weights_and_attentions(name: str) -> None:
    index = bench(name).index
    for attention in FAMILIES[name].attentions:
        for seed in (1, 2):
            other = find(name, FAMILIES[name].make(attention, seed))
            assert other.fingerprint() == index.fingerprint(), (attention, seed)
            assert other == index


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["bert", "llama", "gpt-neox", "t5"])
def test_index_does_not_depend_on_precision(name: str, dtype: torch.dtype) -> None:
    assert find(name, FAMILIES[name].make().to(dtype)) == bench(name).index


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "bart"])
def test_trace_of_a_model_in_training_leaves_nothing_behind(name: str) -> None:
    """Dropout is on, and each layer keeps what generation would use again."""
    model = FAMILIES[name].make().train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert find(name, model) == bench(name).index
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "module", "expected"),
    [
        ("bert", "bert.encoder.layer.0.output.dense", [("dense.weight", 1, 0), ("dense.weight", 0, 0), ("dense.bias", 0, 0)]),
        ("gpt2", "transformer.h.0.mlp.c_proj", [("c_proj.weight", 0, 0), ("c_fc.weight", 1, 0), ("c_fc.bias", 0, 0)]),
        ("gpt2", "transformer.h.1.attn.c_proj", [("c_proj.weight", 0, 0), ("c_attn.weight", 1, 64), ("c_attn.bias", 0, 64)]),
        ("modernbert", "model.layers.0.mlp.Wo", [("Wo.weight", 1, 0), ("Wi.weight", 0, 0), ("Wi.weight", 0, 48)]),
        ("modernbert", "model.layers.0.attn.Wo", [("Wo.weight", 1, 0), ("Wqkv.weight", 0, 64)]),
        ("llama", "model.layers.0.mlp.down_proj", [("down_proj.weight", 1, 0), ("gate_proj.weight", 0, 0), ("up_proj.weight", 0, 0)]),
        ("llama", "model.layers.0.self_attn.o_proj", [("o_proj.weight", 1, 0)]),
        ("llama-ungrouped", "model.layers.0.self_attn.o_proj", [("o_proj.weight", 1, 0), ("v_proj.weight", 0, 0)]),
        (
            "phi3",
            "model.layers.0.mlp.down_proj",
            [("down_proj.weight", 1, 0), ("gate_up_proj.weight", 0, 0), ("gate_up_proj.weight", 0, 48)],
        ),
        ("gpt-neox", "gpt_neox.layers.0.attention.dense", [("dense.weight", 1, 0)]),
        ("qwen3", "model.layers.0.self_attn.q_norm", [("q_norm.weight", 0, 0)]),
        ("t5", "decoder.block.1.layer.1.EncDecAttention.o", [("o.weight", 1, 0), ("v.weight", 0, 0)]),
        ("t5-gated", "encoder.block.0.layer.1.DenseReluDense.wo", [("wo.weight", 1, 0), ("wi_0.weight", 0, 0), ("wi_1.weight", 0, 0)]),
    ],
)
def test_what_a_neuron_owns(name: str, module: str, expected: list[tuple]) -> None:
    assert owns(name, module) == expected


def test_channels_of_grouped_heads_share_their_values() -> None:
    """Four heads of eight channels read the values of two: a row of the values is what channels of two heads are made of."""
    at = bench("llama")
    found = group("llama", "model.layers.0.self_attn.o_proj")
    mask = torch.ones(found.size)
    mask[[2 * 8 + 3, 3 * 8 + 3]] = 0
    other = copy.deepcopy(at.model)
    get_tensor(other, "model.layers.0.self_attn.v_proj.weight")[8 + 3] = 0
    with torch.no_grad(), masked(at.model, NeuronIndex((found,)), mask):
        torch.testing.assert_close(forward(other), forward(at.model), atol=1e-5, rtol=1e-5)


def test_scales_of_one_plus_the_weight_are_no_neurons_nor_what_reads_them() -> None:
    """To scale such a weight would not scale the channel."""
    assert {g.role for g in bench("gemma").index} == {"hidden", "attention"}
    assert [g.name.rpartition(".")[2] for g in bench("gemma").index] == ["o_proj", "down_proj"] * 2


def test_layers_that_share_their_weight_are_left_out() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, CLASSES)
            self.third.weight = self.second.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.third(self.second(self.first(x).relu()).relu()).relu())

    index = discover(Tied(), lambda m: m(torch.randn(2, 6)), CLASSES)
    assert not [p for g in index for p in g.params if p.param.startswith(("second", "third"))]


def test_a_layer_that_runs_again_on_something_else_has_no_hidden_units() -> None:
    """Its input is a norm's the first time, and hidden units the second: neither is masked without the other."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.layer, self.head = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(self.layer(self.norm(x)).relu()).relu())

    index = discover(Twice(), lambda m: m(torch.randn(2, 6)), CLASSES)
    assert [(g.name, g.role) for g in index] == [("norm", "norm"), ("head", "hidden"), ("head[out]", "head")]
