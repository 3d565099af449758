"""Masks: partial ones, other dtypes and layouts, ties, and files that do not fit."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

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
