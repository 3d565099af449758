"""Models whose parameters are spread over processes (FSDP2, gloo, on the CPU)."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from commands import launch
from safetensors.torch import load_file
from sentences import FILLERS, GERMAN, TOPICS, colours, tokenizer, topics

from hf_purify import measure, purify
from hf_purify.discovery import _numbered, discover
from hf_purify.errors import ConfigError, ModelError
from hf_purify.masks import MASK_FILE
from hf_purify.recipe import MeasureRecipe
from hf_purify.registry import find, names
from hf_purify.session import make_accelerator, open_session
from hf_purify.twins import index_by_twin

TESTS = Path(__file__).resolve().parents[1]
FSDP = TESTS.parent / "recipes" / "accelerate" / "fsdp2.yaml"
SPREADING = [name for name in names("method") if find("method", name).spreads]
CASES = [("llama", method) for method in [*SPREADING, "fine_tune!"]] + [("bert", method) for method in ("nft", "ft_sam")]
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that writes and a classifier, with random weights, and data for each."""
    from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

    made = tmp_path_factory.mktemp("spread")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, bos_token_id=2, eos_token_id=3, **SIZES)).save_pretrained(made / "llama")
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "id2label": dict(enumerate(TOPICS))}
    BertForSequenceClassification(BertConfig(**SIZES, **still)).save_pretrained(made / "bert")
    words = [*FILLERS, *(w for words in TOPICS.values() for w in words), *GERMAN]
    for name in ("llama", "bert"):
        tokenizer(made / name, words)
    colours(40, 0, german=False).to_parquet(made / "llama.parquet")
    topics(60, 0).to_parquet(made / "bert.parquet")
    return made


@pytest.fixture(scope="module")
def results(folder: Path) -> Callable[[str, int], Path]:
    """The folder with what came of all repairs of a model, whole on one process or spread over two."""
    made: dict[int, Path] = {}

    def run(model: str, processes: int) -> Path:
        if processes not in made:
            made[processes] = folder / f"of-{processes}"
            jobs = [f"{name}/{method}" for name, method in CASES] + ["llama/fine_tune~"] * (processes > 1)
            done = launch(processes, TESTS / "sharded.py", folder, made[processes], *jobs, config=FSDP if processes > 1 else None)
            assert done.returncode == 0, done.stderr[-3000:]
        return made[processes] / model

    return run


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("model", "method"), CASES)
def test_spread_model_is_repaired_as_a_whole_one(results: Callable[[str, int], Path], folder: Path, model: str, method: str) -> None:
    """The same checkpoint, mask and figures; what ran was spread, each process holding its half."""
    one, two = results(model, 1), results(model, 2)
    how = json.loads((two / f"{method}.json").read_text("utf-8"))
    weights = load_file(folder / model / "model.safetensors")
    assert how["kinds"] == ["DTensor"]
    assert how["values here"] <= 0.51 * sum(w.numel() for w in weights.values()) + 100
    assert json.loads((one / f"{method}.json").read_text("utf-8"))["kinds"] == ["Parameter"]
    for file in ("model.safetensors", MASK_FILE):
        whole, spread = (load_file(out / method / file) for out in (one, two))
        assert whole.keys() == spread.keys()
        for key, value in whole.items():
            torch.testing.assert_close(spread[key], value, rtol=0, atol=2e-6, msg=lambda text, key=key: f"{key}: {text}")
    assert load_file(two / method / "model.safetensors").keys() == weights.keys()
    config = (two / method / "config.json").read_text("utf-8")
    assert json.loads(config) == json.loads((one / method / "config.json").read_text("utf-8"))
    reports = [json.loads((out / method / "report.json").read_text("utf-8")) for out in (one, two)]
    for mine, theirs in zip(*(r["rows"] for r in reports), strict=True):
        assert mine["clean_accuracy"] == theirs["clean_accuracy"]
        assert mine["utility"] == pytest.approx(theirs["utility"], rel=1e-5)
    assert not (two / f"{method}.checkpoint").exists()


@pytest.mark.slow
def test_spread_model_computes_in_half_the_bytes(results: Callable[[str, int], Path], folder: Path) -> None:
    """Near the repair in full precision, and not the same; what is stored stays as it was stored."""
    spread, full = (load_file(results("llama", 2) / name / "model.safetensors") for name in ("fine_tune~", "fine_tune"))
    before = load_file(folder / "llama" / "model.safetensors")
    moved = sum(float((full[k] - w).square().sum()) for k, w in before.items()) ** 0.5
    apart = sum(float((full[k] - spread[k]).square().sum()) for k in before) ** 0.5
    assert 0 < apart < 0.1 * moved
    assert {w.dtype for w in spread.values()} == {torch.float32}


@pytest.mark.slow
def test_callbacks_of_a_trainer_whose_model_is_spread(folder: Path, tmp_path: Path) -> None:
    """It is probed while it learns, repaired where it lies, and saved whole: the figures of the saved model are those that were seen."""
    done = launch(2, TESTS / "spread_trainer.py", folder / "bert", folder / "bert.parquet", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads((tmp_path / "seen.json").read_text("utf-8"))
    assert seen["kinds"] == ["DTensor"]
    assert sum("eval_asr" in row for row in seen["log"]) == 6
    assert sum("purify_after_held_out_accuracy" in row for row in seen["log"]) == 1
    row = measure(str(tmp_path / "saved"), str(folder / "bert.parquet"), triggers=["badnets"], device="cpu").rows[0]
    assert seen["found"]["eval_asr"] == row.asr["badnets"].value
    assert seen["found"]["eval_ra"] == row.robust_accuracy["badnets"].value


@pytest.mark.slow
def test_method_that_looks_at_weights_one_by_one(folder: Path, tmp_path: Path) -> None:
    given = [f"model={folder / 'bert'}", f"clean={folder / 'bert.parquet'}", f"output={tmp_path / 'out'}", "device=cpu", "method=wiper"]
    done = launch(2, *given, module="hf_purify_recipes.purify", config=FSDP)
    assert done.returncode != 0
    assert "wiper looks at weights neuron by neuron, and the model is spread over processes: launch without FSDP" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("where", "settings", "said"),
    [
        ("masks", {"method": "nft", "options": {"level": "weight"}}, "masks act on activations alone: leave level='weight' out"),
        ("purifier", {"method": "nft", "as_adapter": True}, "as_adapter (--as-adapter) needs the whole model"),
    ],
)
def test_settings_that_take_a_whole_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, settings: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr(f"hf_purify.{where}.is_sharded", lambda model: True)
    with pytest.raises(ConfigError) as error:
        purify(str(folder / "bert"), str(folder / "bert.parquet"), output=str(tmp_path / "out"), device="cpu", **settings)
    assert said in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_models_that_are_not_spread_as_they_are_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from transformers import ViTImageProcessor

    for module in ("hf_purify.session", "hf_purify_adapters._checkpoints"):
        monkeypatch.setattr(f"{module}.spread_over", lambda: 2)
    live = find("adapter", "vision")().tiny("resnet").loaded
    with pytest.raises(ModelError, match=r"was not loaded so: that is for whole checkpoints of transformers. Launch without FSDP"):
        open_session(MeasureRecipe.make(model=live, test="none", device="cpu"))
    live.model.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"has no layers that can be spread over processes \(FSDP\): launch without it"):
        open_session(MeasureRecipe.make(model=str(tmp_path), test="none", device="cpu"))


@pytest.mark.slow
def test_zero3_is_taken_for_fsdp2(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `accelerate launch` tells its processes of such a config; it would not start without DeepSpeed's package."""
    config = load_config_from_file(str(FSDP.with_name("zero3.yaml")))
    assert config.distributed_type == DistributedType.DEEPSPEED
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", str(config.deepspeed_config["zero_stage"]))
    done = launch(2, TESTS / "sharded.py", folder, tmp_path, "bert/random_mask")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "bert" / "random_mask.json").read_text("utf-8"))["kinds"] == ["DTensor"]
    assert done.stderr.count("the model is spread by FSDP2 instead, in the same shares") == 1


def test_other_stages_of_deepspeed_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    with pytest.raises(ConfigError, match="launched with DeepSpeed, stage 2, whose engine takes a model with one optimizer"):
        make_accelerator(MeasureRecipe.make(model="m", test="t", device="cpu"))


@pytest.mark.parametrize("variant", ["llama", "gpt2", "bert"])
def test_twin_knows_the_neurons_of_all_layers(variant: str) -> None:
    """What is told from three layers is what is found in all."""
    adapter = find("adapter", "text")()
    tiny = adapter.tiny(variant)
    config = copy.deepcopy(tiny.loaded.model.config)
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == config.num_hidden_layers and name != "architectures":
            setattr(config, name, [value[0]] * 7)
    config.num_hidden_layers = 7
    model = type(tiny.loaded.model)(config).eval()
    some = tiny.data.batch(torch.arange(2))
    classes = adapter.classes(tiny.loaded) if adapter.classifies(tiny.loaded) else None

    def trace(m: Any) -> Any:
        return discover(m, lambda m: adapter.logits(m, some), classes)

    whole = trace(model)
    assert _numbered(index_by_twin(model, trace), model).groups == whole.groups
    assert len(whole.groups) > 20


def test_layers_that_differ_have_no_twin() -> None:
    tiny = find("adapter", "text")().tiny("llama")
    config = copy.deepcopy(tiny.loaded.model.config)
    config.num_hidden_layers = 5
    model = type(tiny.loaded.model)(config)
    model.model.layers[3].mlp.up_proj = torch.nn.Linear(1, 1)
    with pytest.raises(ModelError, match=r"the layer 'model.layers.3' is not like 'model.layers.1' \(mlp.up_proj"):
        index_by_twin(model, lambda m: discover(m, lambda m: find("adapter", "text")().logits(m, tiny.data.batch(torch.arange(2)))))


def test_stacks_without_a_twin() -> None:
    tiny = find("adapter", "text")().tiny("t5")
    with pytest.raises(ModelError, match="takes one stack of like layers"):
        index_by_twin(tiny.loaded.model, lambda m: m)
