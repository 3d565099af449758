"""A repair as a PEFT adapter: what PEFT loads and merges is the baked model; what it cannot hold is refused by name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers as hf
from commands import elsewhere
from peft import AutoPeftModel, PeftModel, PeftModelForCausalLM, PeftModelForSequenceClassification
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_purify.discovery import discover
from hf_purify.errors import ConfigError, IndexMismatch, ModelError
from hf_purify.ia3 import Carried, save_ia3
from hf_purify.masks import bake
from hf_purify.neurons import NeuronGroup, NeuronIndex, ParamSlice, get_tensor
from hf_purify.registry import find

FILES = {"adapter_config.json", "adapter_model.safetensors"}
IDS = torch.randint(5, 60, (3, 7), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
VISION = find("adapter", "vision")

TEXT: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: hf.BertForSequenceClassification(
        hf.BertConfig(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=3)
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, **TOKENS)),
    "gpt2-classifier": lambda: hf.GPT2ForSequenceClassification(
        hf.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, num_labels=3, **TOKENS)
    ),
    "llama": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24, **TOKENS)
    ),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
    ),
}
TOKENS = {"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


class Join(nn.Module):
    """Two maps side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.conv = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 6, 3), nn.Conv2d(10, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.cat([self.left(x), self.right(x)], 1).relu()).mean((2, 3))


PLAIN: dict[str, Callable[[], nn.Module]] = {
    "filters": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    "flattened": lambda: nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5)),
    "video": lambda: nn.Sequential(
        nn.Unflatten(2, (4, 8)), nn.Conv3d(3, 4, 3), nn.ReLU(), nn.Conv3d(4, 5, 1), nn.AdaptiveAvgPool3d(1), nn.Flatten()
    ),
    "timm-resnet": lambda: timm.create_model("resnet18", num_classes=5, layers=(1, 1, 1, 1), channels=(8, 16, 16, 16), stem_width=8),
    "timm-convnext": lambda: timm.create_model("convnext_atto", num_classes=5, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), patch_size=2),
}
NETWORKS = [*VISION.variants, *TEXT, *PLAIN]
networks = pytest.mark.parametrize("name", NETWORKS)


class Case:
    """A small network with shifts that show, its neurons, and a mask of zeros, ones and values between."""

    def __init__(self, name: str, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.name = name
        if name in VISION.variants:
            tiny = VISION().tiny(name, seed)
            batch = tiny.data.batch(torch.arange(4))
            self.model, self.inputs = tiny.loaded.model.eval(), {"pixel_values": batch["pixel_values"]}
            self.index: NeuronIndex = VISION().index(tiny.loaded, batch)
        else:
            self.model = (TEXT | PLAIN)[name]().eval()
            decoder = {"decoder_input_ids": IDS} if name == "t5" else {}
            self.inputs = {"input_ids": IDS, **decoder} if name in TEXT else {}
            classes = {"bert": 3, "gpt2-classifier": 3}.get(name) if name in TEXT else 5
            self.index = discover(self.model, self.logits, classes)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, value in self.model.named_parameters():
                if key.endswith("bias"):
                    value.copy_(torch.randn(value.shape, generator=generator))
                elif value.dim() == 1 and value.abs().max() < 1e-3:
                    value.fill_(0.7)
        self.mask = torch.rand(len(self.index), generator=generator)
        self.mask[::5], self.mask[1::5] = 0, 1
        for group, part in zip(self.index, self.mask.split(self.index.sizes), strict=True):
            if group.role == "head" and group.bias:
                part.fill_(1)

    def logits(self, model: nn.Module) -> Tensor:
        out = model(**self.inputs) if self.inputs else model(IMAGES)
        return out if isinstance(out, Tensor) else out.logits

    def baked(self) -> nn.Module:
        return bake(copy.deepcopy(self.model), self.index, self.mask)

    def save(self, out: Path, **options: Any) -> Carried:
        out.mkdir(exist_ok=True)
        return save_ia3(out, self.model, self.index, options.pop("mask", self.mask), base="org/base", **options)

    def load(self, out: Path) -> PeftModel:
        return PeftModel.from_pretrained(copy.deepcopy(self.model), out)

    def only(self, *groups: NeuronGroup) -> None:
        """Keep these neurons, with a mask that shows each of them."""
        self.index = NeuronIndex(groups)
        self.mask = torch.linspace(0.1, 0.9, len(self.index))


def same(first: nn.Module, second: nn.Module) -> bool:
    """Are keys, their order, dtypes and values the same?"""
    one, two = first.state_dict(), second.state_dict()
    return list(one) == list(two) and all(v.dtype == two[k].dtype and torch.equal(v, two[k]) for k, v in one.items())


def config(out: Path) -> dict[str, Any]:
    return json.loads((out / "adapter_config.json").read_text("utf-8"))


@networks
@torch.no_grad()
def test_adapter_is_the_baked_model(name: str, tmp_path: Path) -> None:
    case = Case(name)
    plain, repaired = case.logits(case.model), case.logits(case.baked())
    assert (plain - repaired).abs().max() > 1e-3
    case.save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == FILES
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) < 64 << 10
    loaded = case.load(tmp_path)
    torch.testing.assert_close(case.logits(loaded), repaired, atol=1e-5, rtol=1e-5)
    with loaded.disable_adapter():
        assert torch.equal(case.logits(loaded), plain)
    merged = loaded.merge_and_unload()
    assert same(merged, case.baked())
    assert torch.equal(case.logits(merged), repaired)
    assert [(n, type(m)) for n, m in merged.named_modules()] == [(n, type(m)) for n, m in case.model.named_modules()]


@networks
def test_model_stays_as_it_is(name: str, tmp_path: Path) -> None:
    case = Case(name)
    before = copy.deepcopy(case.model)
    parameters = {n: (id(p), p.requires_grad) for n, p in case.model.named_parameters()}
    case.save(tmp_path)
    assert same(case.model, before)
    assert {n: (id(p), p.requires_grad) for n, p in case.model.named_parameters()} == parameters
    assert [(n, type(m)) for n, m in case.model.named_modules()] == [(n, type(m)) for n, m in before.named_modules()]


@pytest.mark.parametrize("name", ["resnet", "vit", "gpt2"])
def test_mask_of_ones_is_an_adapter_that_changes_nothing(name: str, tmp_path: Path) -> None:
    case = Case(name)
    assert case.save(tmp_path, mask=torch.ones(len(case.index))) == Carried([], [])
    assert not load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(case.logits(case.load(tmp_path)), case.logits(case.model))
    assert same(case.load(tmp_path).merge_and_unload(), case.model)


def test_kept_groups_are_left_out(tmp_path: Path) -> None:
    case = Case("vit")
    mask = torch.ones(len(case.index))
    case.index.split(mask)["vit.layers.1.mlp.fc2"][3] = 0
    assert case.save(tmp_path, mask=mask) == Carried(["vit.layers.1.mlp.fc2"], [])
    (vector,) = load_file(tmp_path / "adapter_model.safetensors").values()
    assert vector.shape == (1, 32)
    assert vector.sum() == 31


def test_norms_are_saved_whole_and_layers_scaled(tmp_path: Path) -> None:
    case = Case("gpt2")
    carried = case.save(tmp_path, revision="abc")
    assert carried.scaled == [f"transformer.h.{i}.{n}.c_proj" for i in (0, 1) for n in ("attn", "mlp")]
    assert set(carried.saved) == {g.name for g in case.index.where(role="norm")}
    found = config(tmp_path)
    assert (found["peft_type"], found["base_model_name_or_path"], found["revision"]) == ("IA3", "org/base", "abc")
    assert found["fan_in_fan_out"]
    assert found["auto_mapping"]["base_model_class"] == "GPT2LMHeadModel"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_merges_to_the_same_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    case = Case("vit")
    case.model.to(dtype)
    case.save(tmp_path)
    assert same(case.load(tmp_path).merge_and_unload(), case.baked())


@torch.no_grad()
def test_replaced_statistics_come_along(tmp_path: Path) -> None:
    """Of norms with a mask and of norms without one, by checkpoint key."""
    case = Case("resnet")
    mask = torch.ones(len(case.index))
    first, *_, last = case.index.where(role="norm")
    case.index.split(mask)[last.name][::2] = 0.5
    names = [f"{g.name}.{leaf}" for g in (first, last) for leaf in ("running_mean", "running_var", "num_batches_tracked")]
    extra = {n: (get_tensor(case.model, n) + 3) for n in names}
    case.mask, case.index = mask, NeuronIndex(case.index.groups, {n: f"old.{n}" for n in names})
    carried = case.save(tmp_path, extra={f"old.{n}": v for n, v in extra.items()})
    assert carried == Carried([], [first.name, last.name])
    repaired = case.baked()
    for name, value in extra.items():
        get_tensor(repaired, name).copy_(value)
    loaded = case.load(tmp_path)
    torch.testing.assert_close(case.logits(loaded), case.logits(repaired))
    assert same(loaded.merge_and_unload(), repaired)


@pytest.mark.parametrize(
    "extra", [{"norm.running_mean": torch.ones(8)}, {"resnet.embedder.embedder.normalization.running_mean": torch.ones(3)}]
)
def test_statistics_of_another_model_are_refused(extra: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(IndexMismatch, match="which this model has not"):
        Case("resnet").save(tmp_path, extra=extra)


@torch.no_grad()
def test_runs_of_inputs_and_groups_of_one_layer(tmp_path: Path) -> None:
    """Gates over a part of a layer's input: two that meet are multiplied, and what no neuron owns keeps its scale."""
    case = Case("gpt2-classifier")
    layer = "transformer.h.0.mlp.c_proj"
    case.only(
        NeuronGroup("first", 20, (ParamSlice(f"{layer}.weight", 0, 4),)),
        NeuronGroup("second", 5, (ParamSlice(f"{layer}.weight", 0, 14, 4),)),
        NeuronGroup("class", 2, (ParamSlice("score.weight", 0, 1),), "head"),
    )
    assert case.save(tmp_path).scaled == [layer, "score"]
    vector = load_file(tmp_path / "adapter_model.safetensors")[f"base_model.model.{layer}.ia3_l"].flatten()
    assert vector[:4].eq(1).all()
    assert vector[34:].eq(1).all()
    assert vector[4:34].lt(1).all()
    loaded = case.load(tmp_path)
    torch.testing.assert_close(case.logits(loaded), case.logits(case.baked()))
    for key, value in loaded.merge_and_unload().state_dict().items():
        torch.testing.assert_close(value, case.baked().state_dict()[key])


@torch.no_grad()
def test_one_channel_of_maps_side_by_side(tmp_path: Path) -> None:
    torch.manual_seed(0)
    case = Case("filters")
    case.model = Join().eval()
    case.only(NeuronGroup("right", 6, (ParamSlice("conv.weight", 1, 4),)))
    case.save(tmp_path)
    torch.testing.assert_close(case.logits(case.load(tmp_path)), case.logits(case.baked()))
    assert same(case.load(tmp_path).merge_and_unload(), case.baked())


@pytest.mark.parametrize(
    ("name", "task", "kind"),
    [
        ("bert", "SEQ_CLS", PeftModelForSequenceClassification),
        ("gpt2-classifier", "SEQ_CLS", PeftModelForSequenceClassification),
        ("llama", "CAUSAL_LM", PeftModelForCausalLM),
    ],
)
@torch.no_grad()
def test_task_names_the_class_of_the_adapter(name: str, task: str, kind: type, tmp_path: Path) -> None:
    """PEFT saves the head of a classifier whole; a mask on it arrives there."""
    case = Case(name)
    carried = case.save(tmp_path, task_type=task)
    head = {"bert": "classifier", "gpt2-classifier": "score"}.get(name)
    assert head is None or head in carried.saved
    loaded = case.load(tmp_path)
    assert type(loaded) is kind
    torch.testing.assert_close(case.logits(loaded), case.logits(case.baked()), atol=1e-5, rtol=1e-5)
    assert same(loaded.merge_and_unload(), case.baked())


def test_unknown_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Invalid task type: 'REPAIR'"):
        Case("bert").save(tmp_path, task_type="REPAIR")


@pytest.mark.parametrize("name", ["resnet", "vit"])
@torch.no_grad()
def test_base_is_found_by_its_name(name: str, tmp_path: Path) -> None:
    case = Case(name)
    case.model.save_pretrained(tmp_path / "base")
    repair = tmp_path / "repair"
    repair.mkdir()
    save_ia3(repair, case.model, case.index, case.mask, base=str(tmp_path / "base"))
    for loaded in (AutoPeftModel.from_pretrained(repair), hf.AutoModelForImageClassification.from_pretrained(repair).eval()):
        torch.testing.assert_close(case.logits(loaded), case.logits(case.baked()), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_needs_no_hf_purify(tmp_path: Path) -> None:
    case = Case("convnext")
    case.save(tmp_path / "repair")
    case.model.save_pretrained(tmp_path / "base")
    save_file(case.inputs, tmp_path / "inputs.safetensors")
    code = """
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

model = PeftModel.from_pretrained(AutoModelForImageClassification.from_pretrained("base"), "repair")
inputs = load_file("inputs.safetensors")
loaded = model(**inputs).logits
merged = model.merge_and_unload()(**inputs).logits
save_file({"loaded": loaded.detach(), "merged": merged.detach()}, "logits.safetensors")
"""
    elsewhere(code, tmp_path)
    for logits in load_file(tmp_path / "logits.safetensors").values():
        torch.testing.assert_close(logits, case.logits(case.baked()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden_size": 32}, RuntimeError, "size mismatch"),
        ({"num_hidden_layers": 0}, ValueError, "No modules were targeted|not found in the base model"),
    ],
)
def test_base_of_another_shape_is_refused_by_peft(change: dict[str, int], error: type[Exception], message: str, tmp_path: Path) -> None:
    case = Case("vit")
    case.save(tmp_path)
    other = hf.ViTForImageClassification(hf.ViTConfig(**(case.model.config.to_dict() | change)))
    with pytest.raises(error, match=message):
        PeftModel.from_pretrained(other, tmp_path)


class Refused:
    """Networks and neurons that no adapter can hold."""

    @staticmethod
    def head_with_bias() -> tuple[nn.Module, NeuronIndex]:
        case = Case("bert")
        return case.model, case.index.where(role="head")

    @staticmethod
    def both_sides_of_a_layer() -> tuple[nn.Module, NeuronIndex]:
        groups = (NeuronGroup("0", 4, (ParamSlice("0.weight", 1),)), NeuronGroup("0[out]", 3, (ParamSlice("0.weight", 0),), "head"))
        return nn.Sequential(nn.Linear(4, 3, bias=False)), NeuronIndex(groups)

    @staticmethod
    def attention_of_torch() -> tuple[nn.Module, NeuronIndex]:
        model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten(), nn.Linear(40, 3)).eval()
        x = torch.randn(2, 5, 8)
        return model, discover(model, lambda m: m(x), 3).where(role="attention")

    @staticmethod
    def tied_head() -> tuple[nn.Module, NeuronIndex]:
        return Case("gpt2").model, NeuronIndex((NeuronGroup("lm_head", 60, (ParamSlice("lm_head.weight", 0),), "head"),))

    @staticmethod
    def one_dimension() -> tuple[nn.Module, NeuronIndex]:
        model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.Conv1d(4, 5, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten())
        x = torch.randn(2, 3, 9)
        return model, discover(model, lambda m: m(x)).where(role="hidden")

    @staticmethod
    def convolution_in_groups() -> tuple[nn.Module, NeuronIndex]:
        return nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)), NeuronIndex((NeuronGroup("0", 1, (ParamSlice("0.weight", 1),)),))

    @staticmethod
    def norm_named_like_others() -> tuple[nn.Module, NeuronIndex]:
        model = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=32, embed_dim=16, depth=1, num_heads=2).eval()
        x = torch.randn(1, 3, 32, 32)
        return model, discover(model, lambda m: m(x), 3).where("norm")


@pytest.mark.parametrize(
    ("refused", "name", "why"),
    [
        (Refused.head_with_bias, r"classifier\[out\]", "the bias of these outputs"),
        (Refused.both_sides_of_a_layer, r"0\[out\]", "scales one side"),
        (Refused.attention_of_torch, "0.self_attn.out_proj", "'0.self_attn' uses its weight"),
        (Refused.tied_head, "lm_head", "tied"),
        (Refused.one_dimension, "2", "IA3 has no Conv1d"),
        (Refused.convolution_in_groups, "0", "in groups"),
        (Refused.norm_named_like_others, "norm", "would take '.*norm' for it"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_what_an_adapter_cannot_hold_is_named(
    refused: Callable[[], tuple[nn.Module, NeuronIndex]], name: str, why: str, tmp_path: Path
) -> None:
    model, index = refused()
    with pytest.raises(ModelError, match=rf"cannot carry 1 .*'{name}': .*{why}.*Use the repaired checkpoint, or .*neuron_mask.safetensors"):
        save_ia3(tmp_path, model, index, torch.zeros(len(index)), base="org/base")
    assert not list(tmp_path.iterdir())


def test_replaced_buffer_of_a_large_module_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_buffer("steps", torch.zeros(1))
    index = NeuronIndex((NeuronGroup("0", 4, (ParamSlice("0.weight", 1),)),))
    with pytest.raises(ModelError, match="'0': only a norm is small enough"):
        save_ia3(tmp_path, model, index, torch.ones(4), base="org/base", extra={"0.steps": torch.ones(1)})


def test_mask_of_another_length_is_refused(tmp_path: Path) -> None:
    case = Case("vit")
    with pytest.raises(IndexMismatch, match="one value per neuron"):
        case.save(tmp_path, mask=case.mask[:-1])
    assert not list(tmp_path.iterdir())
