"""Masks: partial ones, other dtypes and layouts, ties, what their gradients need, and files that do not fit."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from hf_purify import masks
from hf_purify.discovery import discover
from hf_purify.errors import ConfigError, IndexMismatch
from hf_purify.masks import bake, load_mask, masked, save_mask
from hf_purify.neurons import NeuronGroup, NeuronIndex, ParamSlice, owned


def network() -> tuple[nn.Module, NeuronIndex, Tensor]:
    torch.manual_seed(0)
    filters = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*filters, nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5))
    nn.init.normal_(model[1].bias)
    x = torch.randn(2, 3, 8, 8)
    return model.eval(), discover(model, lambda m: m(x), 5), x


def test_partial_mask_equals_a_whole_one_with_ones_elsewhere() -> None:
    model, index, x = network()
    part = index.where(role="hidden")
    values = torch.linspace(0, 1, len(part))
    with torch.no_grad():
        for level in ("activation", "weight"):
            with masked(model, part, values, level=level):
                some = model(x)
            with masked(model, index, index.embed(part, values), level=level):
                torch.testing.assert_close(model(x), some)
    assert not torch.allclose(some, model(x))


def test_removed_hidden_unit_is_removed_by_hand_too() -> None:
    model, index, x = network()
    mask = torch.ones(len(index))
    position = sum(g.size for g in index.groups[: [g.name for g in index].index("7")]) + 2
    mask[position] = 0
    hand = copy.deepcopy(model)
    with torch.no_grad():
        hand[7].weight[:, 2] = 0
        with masked(model, index, mask):
            torch.testing.assert_close(model(x), hand(x))
        assert torch.equal(bake(model, index, mask)[7].weight, hand[7].weight)


def test_norm_keeps_its_shift_unless_told() -> None:
    model, index, _ = network()
    part = index.where(role="norm")
    shift = model[1].bias.detach().clone()
    assert torch.equal(bake(copy.deepcopy(model), part, torch.zeros(4))[1].bias, shift)
    assert not bake(copy.deepcopy(model), part, torch.zeros(4), bias=True)[1].bias.any()


def test_class_rows_keep_their_bias() -> None:
    model, index, x = network()
    head = index.where(role="head")
    with torch.no_grad(), masked(model, head, torch.zeros(5)):
        torch.testing.assert_close(model(x), model[7].bias.expand(2, 5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keeps_its_dtype(dtype: torch.dtype) -> None:
    model, index, x = network()
    model, x = model.to(dtype), x.to(dtype)
    mask = torch.rand(len(index), generator=torch.Generator().manual_seed(0))
    kept = {k: v.dtype for k, v in model.state_dict().items()}
    learned = nn.Parameter(mask.clone())
    with masked(model, index, learned):
        out = model(x)
        out.float().sum().backward()
    assert out.dtype == dtype
    assert learned.grad is not None
    assert learned.grad.dtype == torch.float32
    with torch.no_grad():
        baked = bake(copy.deepcopy(model), index, mask)
    assert {k: v.dtype for k, v in baked.state_dict().items()} == kept
    torch.testing.assert_close(baked(x), out, atol=0.05, rtol=0.05)


def test_gpt2_layers_have_their_neurons_on_the_other_axis() -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(6, 4), nn.GELU(), Conv1D(5, 6))
    x = torch.randn(3, 4)
    index = discover(model, lambda m: m(x), 5)
    hidden = index.where(role="hidden")
    assert hidden.groups[0].params == (ParamSlice("2.weight", 0), ParamSlice("0.weight", 1), ParamSlice("0.bias", 0))
    mask = torch.rand(len(index))
    with torch.no_grad():
        found = []
        for level in ("activation", "weight"):
            with masked(model, index, mask, level=level):
                found.append(model(x))
        hand = copy.deepcopy(model)
        hand[2].weight.mul_(mask[:6, None]).mul_(mask[None, 6:])
        torch.testing.assert_close(found[0], hand(x))
        torch.testing.assert_close(found[1], hand(x))
        assert torch.equal(bake(model, index, mask)[2].weight, hand[2].weight)


def attention(kind: str) -> tuple[nn.Module, NeuronIndex, Tensor]:
    """Attention of torch itself, whose `out_proj` never runs, by itself and in a layer that torch may run as one kernel."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            options = {"batch_first": True, "dropout": 0.0}
            self.embed = nn.Linear(8, 8)
            if kind == "bare":
                self.attn = nn.MultiheadAttention(8, 2, **options)
            else:
                self.attn = nn.TransformerEncoderLayer(8, 2, 16, **options, norm_first=kind == "pre-norm")
            self.head = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            x = self.attn(x, x, x, need_weights=False)[0] if kind == "bare" else self.attn(x)
            return self.head(x.mean(1))

    torch.manual_seed(0)
    model, x = Encoder().eval(), torch.randn(2, 3, 8)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model, discover(model, lambda m: m(x), 5), x


@pytest.mark.parametrize("kind", ["bare", "pre-norm", "post-norm"])
@pytest.mark.parametrize("bias", [False, True])
def test_attention_of_torch_is_masked_alike_at_both_levels_and_baked(kind: str, bias: bool) -> None:
    model, index, x = attention(kind)
    assert [(g.name, g.size) for g in index.where(role="attention")] == [
        ("attn.out_proj" if kind == "bare" else "attn.self_attn.out_proj", 8)
    ]
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(len(index), generator=generator)
    mask[::5], mask[1::5] = 0, 1
    before = [(n, id(p)) for n, p in model.named_parameters()]
    only = index.where(role="attention")
    for part, values in ((index, mask), (only, torch.rand(8, generator=generator))):
        with torch.no_grad():
            plain = model(x)
            found = []
            for level in ("activation", "weight"):
                with masked(model, part, values, level=level, bias=bias):
                    found.append(model(x))
                    with pytest.raises(RuntimeError):
                        model(x[..., :3])
                assert [(n, id(p)) for n, p in model.named_parameters()] == before
            baked = bake(copy.deepcopy(model), part, values, bias=bias)(x)
            torch.testing.assert_close(model(x), plain)
        assert not torch.allclose(plain, baked, atol=1e-3)
        for output in found:
            torch.testing.assert_close(output, baked, atol=1e-5, rtol=1e-5)
    hooks = [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
    assert not hooks


def test_masked_value_of_torchs_attention_is_silent_and_gets_a_gradient() -> None:
    """A neuron that is removed takes its value rows along: what they hold does not matter any more."""
    model, index, x = attention("bare")
    model.requires_grad_(False)
    part = index.where(role="attention")
    grads = []
    for level in ("activation", "weight"):
        mask = nn.Parameter(torch.linspace(0, 1, 8))
        with masked(model, part, mask, level=level):
            out = model(x)
            out.square().sum().backward()
        assert mask.grad is not None
        assert mask.grad.abs().min() > 0
        grads.append(mask.grad)
    torch.testing.assert_close(grads[0], grads[1])
    values = dict(model.named_parameters())
    for own in part.groups[0].params[1:]:
        owned(values[own.param].detach(), own, 8)[0] = 7.0
    with torch.no_grad(), masked(model, part, torch.linspace(0, 1, 8)):
        torch.testing.assert_close(model(x), out.detach())


@pytest.mark.parametrize("called", [False, True], ids=["module", "function"])
def test_channel_of_flattened_maps_is_masked_at_all_its_positions(called: bool, tmp_path: Path) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.wide, self.mid = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(24, 4, 1), nn.Linear(36, 7)
            self.fold, self.head = nn.PixelUnshuffle(2), nn.Linear(7, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.wide(self.fold(self.conv(x).relu())).relu().flatten(1)
            return self.head((torch.nn.functional.linear(x, self.mid.weight, self.mid.bias) if called else self.mid(x)).relu())

    torch.manual_seed(0)
    model, x = Flat().eval(), torch.randn(2, 3, 6, 6)
    index = discover(model, lambda m: m(x), 5)
    assert [(g.name, g.size, g.gate.width) for g in index] == [("wide", 6, 4), ("mid", 4, 9), ("head", 7, 1), ("head[out]", 5, 1)]
    mask = torch.rand(len(index), generator=torch.Generator().manual_seed(1))
    mask[7] = 0
    baked = bake(copy.deepcopy(model), index, mask)
    assert not baked.mid.weight[:, 9:18].any()
    torch.testing.assert_close(baked.mid.weight[:, 18:27], model.mid.weight[:, 18:27] * mask[8])
    grads = []
    for level in ("activation", "weight"):
        learned = nn.Parameter(mask.clone())
        with masked(model, index, learned, level=level):
            out = model(x)
            out.square().sum().backward()
        torch.testing.assert_close(out, baked(x))
        grads.append(learned.grad)
    torch.testing.assert_close(grads[0], grads[1])
    silent = index.embed(part := index.where("mid"), torch.tensor([1.0, 0, 1, 1]))
    hand = copy.deepcopy(model)
    nn.init.zeros_(hand.wide.weight[1]), nn.init.zeros_(hand.wide.bias[1:2])
    with masked(model, index, silent):
        torch.testing.assert_close(model(x), hand(x))
    save_mask(tmp_path / "m.safetensors", part, silent[6:10])
    assert torch.equal(load_mask(tmp_path / "m.safetensors", index)[0], silent)


def test_two_groups_of_one_weight_that_is_called_as_a_function() -> None:
    """Hidden inputs and class rows of one parameter: both are scaled, and the parameter is put back whole."""

    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.linear(self.first(x).relu(), self.second.weight, self.second.bias)

    torch.manual_seed(0)
    model, x = Called(), torch.randn(3, 4)
    index = discover(model, lambda m: m(x), 5)
    assert [g.name for g in index] == ["second", "second[out]"]
    mask, kept = torch.rand(len(index)), model.second.weight
    for bias in (False, True):
        baked = bake(copy.deepcopy(model), index, mask, bias=bias)
        for level in ("activation", "weight"):
            with masked(model, index, mask, level=level, bias=bias):
                for _ in range(2):
                    torch.testing.assert_close(model(x), baked(x))
            assert model.second.weight is kept


def test_class_rows_on_the_other_axis_take_their_bias_along_if_told() -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model, x = nn.Sequential(Conv1D(5, 4)), torch.randn(3, 4)
    nn.init.normal_(model[0].bias)
    index = discover(model, lambda m: m(x), 5)
    mask = torch.rand(5)
    baked = bake(copy.deepcopy(model), index, mask, bias=True)(x)
    for level in ("activation", "weight"):
        with masked(model, index, mask, level=level, bias=True):
            torch.testing.assert_close(model(x), baked)
    torch.testing.assert_close(baked, model(x) * mask)


def test_learned_mask_must_be_a_parameter() -> None:
    model, index, _ = network()
    with pytest.raises(ConfigError, match=r"nn\.Parameter"), masked(model, index, torch.ones(len(index), requires_grad=True)):
        pass


def test_weight_level_keeps_the_order_of_parameters() -> None:
    model, index, x = network()
    before = [(n, id(p)) for n, p in model.named_parameters()]
    with masked(model, index, torch.rand(len(index)), level="weight"):
        model(x)
    assert [(n, id(p)) for n, p in model.named_parameters()] == before


def test_frozen_norm_with_buffers_can_be_masked() -> None:
    """DETR's batch norms keep weight and bias as buffers."""

    class FrozenBatchNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.rand(4) + 0.5)
            self.register_buffer("bias", torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight + self.bias

    model = nn.Sequential(FrozenBatchNorm())
    index = NeuronIndex((NeuronGroup("0", 4, (ParamSlice("0.weight", 0), ParamSlice("0.bias", 0)), "norm"),))
    x, mask = torch.randn(3, 4), torch.tensor([0, 1, 0.5, 0.2])
    with masked(model, index, mask):
        inside = model(x)
    assert "weight" in model[0]._buffers
    torch.testing.assert_close(inside, x * model[0].weight * mask + model[0].bias)
    torch.testing.assert_close(bake(model, index, mask)(x), inside)


def test_file_names_checkpoint_keys_and_carries_the_fingerprint(tmp_path: Path) -> None:
    _, index, _ = network()
    keys = {g.gate.param: f"saved.{g.gate.param}" for g in index}
    index = NeuronIndex(index.groups, keys)
    file = tmp_path / "mask.safetensors"
    save_mask(file, index, torch.ones(len(index)), {"saved.1.running_mean": torch.zeros(4)}, complete=False)
    with safe_open(file, "pt") as stored:
        assert stored.metadata()["fingerprint"] == index.fingerprint()
        assert all(k.split("/", 1)[1].startswith("saved.") for k in stored.keys())  # noqa: SIM118 - not a mapping
    mask, extra, complete = load_mask(file, index)
    assert mask.tolist() == [1] * len(index)
    assert list(extra) == ["saved.1.running_mean"]
    assert not complete


def test_file_of_a_selection_leaves_the_rest_at_one(tmp_path: Path) -> None:
    _, index, _ = network()
    part = index.where(role="norm")
    save_mask(tmp_path / "m.safetensors", part, torch.zeros(4))
    mask, _, _ = load_mask(tmp_path / "m.safetensors", index)
    assert torch.equal(mask, index.embed(part, torch.zeros(4)))


@pytest.mark.parametrize(
    "stored",
    [{"mask/elsewhere.weight/0": torch.ones(4)}, {"mask/1.weight/0": torch.ones(5)}, {"mask/1.weight/1": torch.ones(4)}],
    ids=["other name", "other size", "other axis"],
)
def test_mask_that_does_not_fit_is_refused(stored: dict[str, Tensor], tmp_path: Path) -> None:
    _, index, _ = network()
    save_file(stored, tmp_path / "m.safetensors", metadata={"format": "hf-purify/1", "fingerprint": "0"})
    with pytest.raises(IndexMismatch, match="belongs to another model: 1 of 1 groups"):
        load_mask(tmp_path / "m.safetensors", index)


def test_other_safetensors_are_no_masks(tmp_path: Path) -> None:
    _, index, _ = network()
    save_file({"weight": torch.ones(4)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IndexMismatch, match="is no neuron mask: expected format 'hf-purify/1', got 'pt'"):
        load_mask(tmp_path / "model.safetensors", index)


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def gelu_new(x: Tensor) -> Tensor:
    """As transformers writes it for GPT-2."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {  # and whether the mask can do without a copy of what it gives
    "gelu": (functional.gelu, True),
    "gelu tanh": (lambda x: functional.gelu(x, approximate="tanh"), True),
    "gelu_new": (gelu_new, True),
    "quick gelu": (quick_gelu, True),
    "silu": (functional.silu, True),
    "SwiGLU": (lambda x: functional.silu(x) * x.flip(-1), True),
    "relu": (torch.relu, False),
    "tanh": (torch.tanh, False),
    "squared relu": (lambda x: torch.relu(x).square(), False),
    "hardswish": (functional.hardswish, False),
    "half": (lambda x: x * 0.5, False),
    "dropout": (lambda x: functional.dropout(functional.gelu(x), 0.5), False),
    "silu in place": (lambda x: functional.silu(x * 2, inplace=True), False),
    "changed in place": (lambda x: functional.gelu(x).mul_(2), False),
    "changed unseen": (lambda x: without_graph(functional.gelu(x)), False),
    "view": (lambda x: functional.gelu(x).flatten(0, 1), False),
}
activations = pytest.mark.parametrize(("act", "again"), ACTIVATIONS.values(), ids=ACTIVATIONS)


def without_graph(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x.mul_(2)


class Block(nn.Module):
    """Hidden units behind an activation function; `run` is how the two of them are called."""

    def __init__(self, act: Callable[[Tensor], Tensor], run: Callable[..., Tensor] = lambda call, x: call(x)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.act, self.run = nn.Linear(6, 8), nn.Linear(8, 5), act, run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(lambda v: self.second(self.act(self.first(v))), x)


HIDDEN = NeuronIndex((NeuronGroup("second", 8, (ParamSlice("second.weight", 1),), "hidden"),))


def inputs(requires_grad: bool = True) -> Tensor:
    return torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1), requires_grad=requires_grad)


def values() -> nn.Parameter:
    return nn.Parameter(torch.linspace(0, 1, 8))


def gradients(model: nn.Module, twice: bool = False, **options: Any) -> list[Tensor]:
    """Output, gradients of mask, input and weights, and with `twice` those of their norm."""
    x, mask = inputs(), values()
    torch.manual_seed(2)
    with masked(model, HIDDEN, mask):
        out = model(x)
        wanted = [mask, x, *model.parameters()]
        wanted = [w for i, w in enumerate(wanted) if w.requires_grad and all(w is not v for v in wanted[:i])]
        found = torch.autograd.grad(out.float().pow(3).sum(), wanted, create_graph=twice, **options)
        if twice:
            found += torch.autograd.grad(sum(f.square().sum() for f in found), wanted, allow_unused=True, materialize_grads=True)
    return [out.detach(), *found]


@pytest.fixture
def plainly(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Call something with masks that are nothing but products."""

    def call(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(masks, "_source", lambda x: None)
            return function(*args, **options)

    return call


def made_again(out: Tensor) -> bool:
    """Whether the graph of `out` has a mask that keeps nothing."""
    nodes, seen = [out.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [n for n, _ in node.next_functions]
    return any(n.name() == "_ProductBackward" for n in seen)


@activations
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_those_of_a_plain_product_bit_by_bit(act: Any, again: bool, frozen: bool, plainly: Callable[..., Any]) -> None:
    model = Block(act).requires_grad_(not frozen)
    with masked(model, HIDDEN, values()):
        assert made_again(model(inputs())) == again
    for mine, plain in zip(gradients(model), plainly(gradients, model), strict=True):
        assert torch.equal(mine, plain)


@activations
def test_gradients_of_gradients_are_those_of_a_plain_product(act: Any, again: bool, plainly: Callable[..., Any]) -> None:
    model = Block(act).double()
    model.register_forward_pre_hook(lambda _, xs: xs[0].double())
    found = gradients(model, twice=True), plainly(gradients, model, twice=True)
    for mine, plain in zip(*found, strict=True):
        torch.testing.assert_close(mine, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["gelu", "silu", "SwiGLU", "gelu_new"])
def test_low_precision_has_the_gradients_of_a_plain_product(dtype: torch.dtype, autocast: bool, name: str, plainly: Any) -> None:
    model = Block(ACTIVATIONS[name][0]).to(dtype)
    model.register_forward_pre_hook(lambda _, xs: xs[0].to(dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with masked(model, HIDDEN, values()):
            assert made_again(model(inputs()))
        found = gradients(model), plainly(gradients, model)
    assert all(torch.equal(mine, plain) for mine, plain in zip(*found, strict=True))


def test_mask_behind_an_activation_function_keeps_nothing_of_it(plainly: Callable[..., Any]) -> None:
    """The hidden activation is gone once the forward pass is over, and a plain product would have kept it."""

    def lives(act: Callable[[Tensor], Tensor]) -> bool:
        seen = []

        def watched(x: Tensor) -> Tensor:
            y = act(x)
            seen.append(weakref.ref(y))
            return y

        model = Block(watched).requires_grad_(False)
        with masked(model, HIDDEN, values()):
            out = model(inputs())
            gc.collect()
            alive = seen[0]() is not None
            out.sum().backward()
        return alive

    for name in ("gelu", "gelu tanh", "silu"):
        act = ACTIVATIONS[name][0]
        assert not lives(act)
        assert plainly(lives, act)


def allocated(call: Callable[[], object]) -> int:
    """Bytes that a call leaves behind."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    events = profile.profiler.kineto_results.events()
    del result
    return sum(e.nbytes() for e in events if e.name() == "[memory]")


@pytest.mark.parametrize("name", [n for n, (_, again) in ACTIVATIONS.items() if again])
def test_graph_is_smaller_by_the_hidden_activations(name: str, plainly: Callable[..., Any]) -> None:
    model, x = Block(ACTIVATIONS[name][0]).requires_grad_(False), inputs()
    with masked(model, HIDDEN, values()):
        model(x)
        saved = plainly(allocated, lambda: model(x)) - allocated(lambda: model(x))
    assert saved >= 3 * 4 * 8 * 4


def on_cpu(call: Callable[..., Tensor], x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return call(x)


def checkpointed(reentrant: bool) -> Callable[..., Tensor]:
    return lambda call, x: checkpoint(call, x, use_reentrant=reentrant)


class Parts(Block):
    """One of the two parts runs under hooks on saved tensors, the other does not."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.run(lambda v: self.act(self.first(v)), x) if self.early else self.act(self.first(x))
        return self.second(hidden) if self.early else self.run(self.second, hidden)


RUNS = {"checkpoint": checkpointed(False), "reentrant": checkpointed(True), "save_on_cpu": on_cpu}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("part", ["whole", "activation", "layer"])
@pytest.mark.parametrize("name", ["gelu", "silu", "SwiGLU"])
def test_packed_tensors_are_left_alone(run: Any, part: str, name: str, plainly: Callable[..., Any]) -> None:
    """Gradient checkpointing and offloading, of the block or of a part: the same gradients, and what they packed is unpacked as often."""
    model = Block(ACTIVATIONS[name][0], run) if part == "whole" else Parts(ACTIVATIONS[name][0], run)
    model.early = part == "activation"

    def backward() -> tuple[list[Tensor | None], int]:
        calls = 0

        def count(*_: object) -> None:
            nonlocal calls
            calls += 1

        handle = model.first.register_forward_hook(count)
        x, mask = inputs(), values()
        model.zero_grad()
        with masked(model, HIDDEN, mask):
            model(x).pow(3).sum().backward()
        handle.remove()
        return [mask.grad, x.grad, *(None if p.grad is None else p.grad.clone() for p in model.parameters())], calls

    (mine, calls), (plain, expected) = backward(), plainly(backward)
    assert calls == expected
    for a, b in zip(mine, plain, strict=True):
        assert a is b is None or torch.equal(a, b)


def test_graph_can_be_walked_again_only_if_it_was_retained() -> None:
    model, mask = Block(functional.gelu), values()
    with masked(model, HIDDEN, mask):
        loss = model(inputs()).square().sum()
        first = torch.autograd.grad(loss, mask, retain_graph=True)[0]
        second = torch.autograd.grad(loss, mask)[0]
        assert torch.equal(first, second)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, mask)


def test_activation_that_was_used_elsewhere_and_freed() -> None:
    """Where another backward pass has freed what the activation function kept, the mask still has its gradient."""
    hidden: list[Tensor] = []
    model, mask = Block(lambda x: hidden.append(functional.gelu(x)) or hidden[-1]), values()
    with masked(model, HIDDEN, mask):
        expected = torch.autograd.grad(model(inputs()).square().sum(), mask)[0]
        out = model(inputs())
        hidden[-1].sum().backward()
        assert torch.equal(torch.autograd.grad(out.square().sum(), mask)[0], expected)
        out = model.second(hidden[-1])  # freed before the mask
        assert not made_again(out)
        assert torch.equal(torch.autograd.grad(out.square().sum(), mask)[0], expected)


def test_input_of_the_activation_changed_in_place_is_found() -> None:
    kept: list[Tensor] = []
    model, mask = Block(lambda x: kept.append(x) or functional.gelu(x)), values()
    with masked(model, HIDDEN, mask):
        out = model(inputs())
        with torch.no_grad():
            kept[-1].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(out.sum(), mask)


def test_activation_changed_in_place_behind_the_mask() -> None:
    """A plain product refuses; what is made again is what was multiplied."""
    kept: list[Tensor] = []
    model, mask = Block(lambda x: kept.append(functional.gelu(x)) or kept[-1]), values()
    with masked(model, HIDDEN, mask):
        expected = torch.autograd.grad(model(inputs()).sum(), mask)[0]
        out = model(inputs())
        kept[-1].add_(1)
        assert torch.equal(torch.autograd.grad(out.sum(), mask)[0], expected)


def test_compiled_and_transformed_models_have_plain_products() -> None:
    model = Block(functional.gelu).requires_grad_(False)
    x, mask = inputs(), values()
    expected = gradients(model)
    with masked(model, HIDDEN, mask):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        compiled(x).pow(3).sum().backward()
        torch.testing.assert_close([mask.grad, x.grad], expected[1:])
        outer = torch.func.grad(lambda v: model(v).pow(3).sum())
        torch.testing.assert_close(outer(x), expected[2])
        each = torch.func.vmap(outer)(x.detach())
        torch.testing.assert_close(each, expected[2])
        _, tangent = torch.func.jvp(lambda v: model(v).pow(3).sum(), (x.detach(),), (torch.ones(x.shape),))
        torch.testing.assert_close(tangent, expected[2].sum())
        with forward_ad.dual_level():
            out = model(forward_ad.make_dual(x, torch.ones(x.shape))).pow(3).sum()
            torch.testing.assert_close(forward_ad.unpack_dual(out).tangent, expected[2].sum())
        out = model(x)
        assert made_again(out)
        batched = torch.autograd.grad(out, [mask, x], torch.ones(2, *out.shape), is_grads_batched=True, retain_graph=True)
        single = torch.autograd.grad(out, [mask, x], torch.ones(out.shape))
        for b, s in zip(batched, single, strict=True):
            torch.testing.assert_close(b[1], s)
    torch.compiler.reset()


def test_fixed_masks_and_frozen_inputs_are_plain_products() -> None:
    model = Block(functional.gelu)
    with masked(model, HIDDEN, torch.rand(8)):
        assert not made_again(model(inputs()))
    model.first.requires_grad_(False)
    with masked(model, HIDDEN, values()):
        assert not made_again(model(inputs(requires_grad=False)))
        with torch.no_grad():
            assert model(inputs()).grad_fn is None
