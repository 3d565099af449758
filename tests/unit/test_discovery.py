"""Discovery on networks that it has no list of: what is found, and what is rightly not."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_purify.discovery import discover
from hf_purify.errors import ModelError
from hf_purify.neurons import NeuronIndex, ParamSlice
from hf_purify.tracing import axes


def find(model: nn.Module, x: Tensor, classes: int = 5) -> NeuronIndex:
    torch.manual_seed(0)
    return discover(model, lambda m: m(x), classes)


def roles(index: NeuronIndex) -> dict[str, str]:
    return {g.name: g.role for g in index}


def params(index: NeuronIndex, name: str) -> list[tuple]:
    """What a neuron owns: parameter, axis, start; and the width where it is not 1."""
    (group,) = (g for g in index if g.name == name)
    return [tuple(p) if p.width > 1 else tuple(p)[:3] for p in group.params]


def test_resnet_has_a_channel_per_norm_with_its_filter() -> None:
    model = timm.create_model("resnet18", num_classes=5, layers=(1, 1, 1, 1), channels=(8, 16, 16, 16), stem_width=8)
    index = find(model, torch.randn(2, 3, 32, 32))
    norms = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert sorted(g.name for g in index.where(role="norm")) == sorted(norms)
    assert roles(index)["fc"] == "head"
    assert params(index, "layer1.0.bn2") == [
        ("layer1.0.bn2.weight", 0, 0),
        ("layer1.0.bn2.bias", 0, 0),
        ("layer1.0.conv2.weight", 0, 0),
    ]
    blocks = {g.name: g.block for g in index}
    assert blocks["bn1"] == 0
    assert blocks["layer1.0.bn1"] == blocks["layer1.0.bn2"] == 1
    assert blocks["layer4.0.bn1"] == 4


def test_convnext_has_hidden_units_in_its_perceptrons() -> None:
    model = timm.create_model("convnext_atto", num_classes=5, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), patch_size=2)
    index = find(model, torch.randn(2, 3, 32, 32))
    hidden = index.where(role="hidden")
    assert [g.name for g in hidden] == [f"stages.{i}.blocks.0.mlp.fc2" for i in range(4)]
    assert [g.size for g in hidden] == [32, 32, 64, 64]
    assert params(index, "stages.0.blocks.0.mlp.fc2")[0] == ("stages.0.blocks.0.mlp.fc2.weight", 1, 0)
    assert ("stages.0.blocks.0.mlp.fc1.weight", 0, 0) in params(index, "stages.0.blocks.0.mlp.fc2")
    assert roles(index)["head.fc"] == "head"


@pytest.mark.parametrize("side", [32, 64])
def test_channels_are_told_from_pixels_where_there_are_as_many(side: int) -> None:
    """Eight channels on maps of eight pixels' side: a norm's channels still lie on axis 1."""
    model = timm.create_model("convnext_atto", num_classes=5, depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), patch_size=2)
    index = find(model, torch.randn(2, 3, side, side))
    assert not [g.name for g in index if g.name.endswith("fc1")]


def test_vit_has_hidden_units_and_attention_values_of_a_fused_projection() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=5)
    index = find(model, torch.randn(2, 3, 32, 32))
    assert [g.name for g in index.where(role="hidden")] == ["blocks.0.mlp.fc2", "blocks.1.mlp.fc2"]
    assert [g.name for g in index.where(role="attention")] == ["blocks.0.attn.proj", "blocks.1.attn.proj"]
    assert params(index, "blocks.0.attn.proj") == [
        ("blocks.0.attn.proj.weight", 1, 0),
        ("blocks.0.attn.qkv.weight", 0, 32),  # queries, keys, then values
        ("blocks.0.attn.qkv.bias", 0, 32),
    ]
    assert roles(index)["head"] == "head"


def test_swin_has_hidden_units_and_attention_values() -> None:
    model = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        patch_size=2,
        window_size=4,
        embed_dim=8,
        depths=(1, 1),
        num_heads=(2, 2),
        num_classes=5,
    )
    index = find(model, torch.randn(2, 3, 32, 32))
    assert len(index.where(role="hidden").groups) == 2
    assert len(index.where(role="attention").groups) == 2
    assert len(index.where(role="head").groups) == 1
    reduction = [g for g in index if "reduction" in g.name]
    assert not reduction, "the inputs of a patch merging are normalized: the norm in front has these neurons"


def test_plain_stack_without_norms() -> None:
    """Filters feed the next layer directly: hidden units, the image's channels are none."""
    filters = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 6, 3), nn.ReLU()]
    model = nn.Sequential(*filters, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    index = find(model, torch.randn(2, 3, 8, 8))
    assert [(g.name, g.role, g.size) for g in index] == [("2", "hidden", 4), ("6", "hidden", 6), ("6[out]", "head", 5)]
    assert params(index, "2") == [("2.weight", 1, 0), ("0.weight", 0, 0), ("0.bias", 0, 0)]
    assert {g.block for g in index} == {0}


def flat_head(middle: list[nn.Module]) -> nn.Module:
    """A head that reads maps of 6 channels and 3 x 3 positions, as that of VGG does."""
    filters = [nn.Conv2d(3, 6, 3, padding=1), *middle, nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    return nn.Sequential(*filters, nn.Flatten(), nn.Dropout(), nn.Linear(54, 7), nn.ReLU(), nn.Linear(7, 5))


def test_flattened_maps_have_a_neuron_per_channel() -> None:
    index = find(flat_head([]), torch.randn(2, 3, 6, 6))
    assert [(g.name, g.role, g.size) for g in index] == [("5", "hidden", 6), ("7", "hidden", 7), ("7[out]", "head", 5)]
    assert params(index, "5") == [("5.weight", 1, 0, 9), ("0.weight", 0, 0), ("0.bias", 0, 0)]


def test_flattened_maps_of_a_norm_are_the_norms_neurons() -> None:
    index = find(flat_head([nn.BatchNorm2d(6)]), torch.randn(2, 3, 6, 6))
    assert [(g.name, g.role, g.size) for g in index] == [("1", "norm", 6), ("8", "hidden", 7), ("8[out]", "head", 5)]


def test_flattened_maps_with_channels_last_are_told_apart() -> None:
    """A channel's columns are no run there: each position stays a unit of its own."""

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 6, 1), nn.Linear(54, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x).permute(0, 2, 3, 1).flatten(1))

    index = find(Last(), torch.randn(2, 3, 3, 3))
    assert params(index, "head") == [("head.weight", 1, 0)]
    assert roles(index) == {"head": "hidden", "head[out]": "head"}


def test_channels_that_are_unfolded_into_more_channels() -> None:
    """The inputs of a convolution behind `PixelUnshuffle` are runs of the channels in front of it."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.PixelUnshuffle(2), nn.Conv2d(16, 6, 1), nn.Flatten(), nn.Linear(54, 5))
    index = find(model, torch.randn(2, 3, 6, 6))
    assert params(index, "2") == [("2.weight", 1, 0, 4), ("0.weight", 0, 0), ("0.bias", 0, 0)]
    assert params(index, "4") == [("4.weight", 1, 0, 9), ("2.weight", 0, 0), ("2.bias", 0, 0)]


class Grouped(nn.Module):
    """Hidden units behind a gate that opens three of them at a time, or one gate for all."""

    def __init__(self, gates: int) -> None:
        super().__init__()
        self.up, self.gate, self.head = nn.Linear(4, 6), nn.Linear(4, gates), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(x) * self.gate(x).sigmoid().repeat_interleave(6 // self.gate.out_features, 1))


@pytest.mark.parametrize("gates", [1, 2])
def test_gate_over_runs_of_units_owns_none_of_them(gates: int) -> None:
    index = find(Grouped(gates), torch.randn(2, 4))
    assert params(index, "head") == [("head.weight", 1, 0), ("up.weight", 0, 0), ("up.bias", 0, 0)]


class Gated(nn.Module):
    """A gated perceptron: `down(silu(gate(x)) * up(x))`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)
        self.gate, self.up, self.down = nn.Linear(6, 10, bias=False), nn.Linear(6, 10, bias=False), nn.Linear(10, 6, bias=False)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        h = self.norm(x)
        return self.head(x + self.down(F.silu(self.gate(h)) * self.up(h)))


def test_gated_perceptron_unit_owns_gate_up_and_down() -> None:
    index = find(Gated(), torch.randn(2, 3, 6))
    assert params(index, "down") == [("down.weight", 1, 0), ("gate.weight", 0, 0), ("up.weight", 0, 0)]
    assert roles(index) == {"norm": "norm", "down": "hidden", "head": "head"}


class Attention(nn.Module):
    """Self-attention with separate projections."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        h = self.norm(x)
        q, k, v = (p(h).unflatten(-1, (2, 4)).transpose(1, 2) for p in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head((x + self.out(mixed)).mean(1))


def test_attention_neurons_are_the_value_channels() -> None:
    index = find(Attention(), torch.randn(2, 3, 8))
    assert params(index, "out") == [("out.weight", 1, 0), ("value.weight", 0, 0), ("value.bias", 0, 0)]
    assert roles(index)["out"] == "attention"


class Fused(nn.Module):
    """Pre-norm attention of torch itself: one parameter for three projections, and an `out_proj` that never runs."""

    def __init__(self, cross: bool = False, **options: object) -> None:
        super().__init__()
        self.embed, self.norm, self.cross = nn.Linear(8, 8), nn.LayerNorm(8), cross
        self.attn = nn.MultiheadAttention(8, 2, **options)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        h = self.norm(x)
        query = h + 1 if self.cross else h
        mixed, _ = self.attn(query, h, h[..., : self.attn.vdim] if self.attn.vdim < 8 else h)
        return self.head((x + mixed).mean(1))


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bias": False}, {"dropout": 0.1}], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_attention_of_torch_has_values_in_its_one_parameter(cross: bool, options: dict, frozen: bool) -> None:
    model = Fused(cross, **options).requires_grad_(not frozen)
    index = find(model, torch.randn(2, 3, 8))
    values = [("attn.in_proj_weight", 0, 16), ("attn.in_proj_bias", 0, 16)]  # queries, keys, then values
    assert params(index, "attn.out_proj") == [("attn.out_proj.weight", 1, 0), *values[: 1 if "bias" in options else 2]]
    assert roles(index) == {"norm": "norm", "attn.out_proj": "attention", "head": "head"}
    (group,) = index.where(role="attention")
    assert (group.module, group.caller) == ("attn.out_proj", "attn")
    assert all(g.caller is None for g in index if g is not group)


def test_attention_of_torch_with_separate_projections() -> None:
    """Values of another size have a parameter of their own, and their place in the common bias."""
    index = find(Fused(vdim=6), torch.randn(2, 3, 8))
    assert params(index, "attn.out_proj") == [
        ("attn.out_proj.weight", 1, 0),
        ("attn.v_proj_weight", 0, 0),
        ("attn.in_proj_bias", 0, 16),
    ]


def test_attention_of_torch_on_the_input_itself() -> None:
    """Frozen, it would run as one kernel; its projections read the model's input, so they have no hidden inputs."""

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attn(x, x, x, need_weights=False)[0])

    before = torch.backends.mha.get_fastpath_enabled(), F.linear
    index = find(Bare().requires_grad_(False), torch.randn(2, 3, 8))
    assert roles(index) == {"attn.out_proj": "attention", "head": "hidden", "head[out]": "head"}
    assert params(index, "head")[1:] == [("attn.out_proj.weight", 0, 0), ("attn.out_proj.bias", 0, 0)]
    assert (torch.backends.mha.get_fastpath_enabled(), F.linear) == before


class Functional(nn.Module):
    """Layers that are parameters and calls of a function, as Swin v2 and BEiT use their fused projections."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shift = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6))
        self.second = nn.Linear(6, 5)
        self.table = nn.Embedding(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.linear(input=x, weight=self.first, bias=self.shift))
        return F.linear(F.linear(x, self.second.weight, bias=self.second.bias.clone()), self.table.weight)


def test_layers_that_are_calls_of_a_function() -> None:
    index = find(Functional(), torch.randn(2, 4))
    assert params(index, "second") == [("second.weight", 1, 0), ("first", 0, 0), ("shift", 0, 0)]
    assert params(index, "second[out]") == [("second.weight", 0, 0)], "the bias is no parameter here"
    assert {g.name: g.caller for g in index} == {"second": "", "second[out]": ""}, "a mask on a tied head would mask the embedding"


@pytest.mark.parametrize(("name", "side"), [("swinv2_tiny_window8_256", 256), ("beit_base_patch16_224", 32)])
def test_fused_projections_that_are_called_as_functions(name: str, side: int) -> None:
    small = {"embed_dim": 8, "depths": (1, 1), "num_heads": (2, 2)} if "swin" in name else {"embed_dim": 16, "depth": 2, "num_heads": 2}
    model = timm.create_model(name, num_classes=5, **small, **({} if "swin" in name else {"img_size": side, "patch_size": 8}))
    groups = find(model, torch.randn(2, 3, side, side)).where(role="attention").groups
    assert len(groups) == 2
    for group in groups:
        qkv = group.name.replace("proj", "qkv.weight")
        assert group.params[1] == ParamSlice(qkv, 0, 2 * group.size)


class Residual(nn.Module):
    """A residual stream without norms: its channels are written by several layers and read by all."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.first(x))
        x = F.relu(x + self.second(x))
        return self.head(x.mean((2, 3)))


def test_residual_stream_is_no_hidden_layer() -> None:
    index = find(Residual(), torch.randn(2, 3, 6, 6))
    found = roles(index)
    assert "second" not in found
    assert found["head"] == "head", "the inputs of the head are the stream, no hidden units"


def test_tracing_leaves_nothing_behind() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Linear(6, 5)).train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    before = find(model, torch.randn(3, 4)).fingerprint()
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items()), "running statistics stay as they are"
    assert find(model, torch.randn(3, 4)).fingerprint() == before
    with pytest.raises(ZeroDivisionError):
        discover(model, lambda m: 1 // 0)
    assert not any(m._forward_hooks for m in model.modules())
    assert model.training


def test_frozen_weights_are_found_too() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5)).requires_grad_(False)
    assert [g.name for g in find(model, torch.randn(3, 4))] == ["2", "2[out]"]


def test_no_neurons_is_an_error() -> None:
    with pytest.raises(ModelError, match="no neurons found"):
        find(nn.Sequential(nn.Flatten(), nn.Linear(4, 7)), torch.randn(3, 4), classes=5)


def test_axes_of_layers() -> None:
    from transformers.pytorch_utils import Conv1D

    assert axes(nn.Linear(3, 4)) == (0, 1)
    assert axes(nn.Conv2d(4, 8, 3)) == (0, 1)
    assert axes(nn.Conv2d(4, 8, 3, groups=4)) == (0, -1)
    assert axes(nn.ConvTranspose2d(4, 8, 3)) == (1, 0)
    assert axes(Conv1D(6, 4)) == (1, 0)
    assert axes(nn.Embedding(4, 6)) is None
    assert axes(nn.LayerNorm(4)) is None
