"""Adapters of PEFT: a repair taken away as one, a LoRA that is repaired, a LoRA that is made a victim."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers as hf
from commands import run
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_purify import apply_mask, implant, measure, purify
from hf_purify.errors import ConfigError, ModelError, UnsafeCheckpoint
from hf_purify.method import Method
from hf_purify.recipe import PurifyRecipe
from hf_purify.registry import find, make_method, names
from hf_purify.report import Report
from hf_purify.session import load
from hf_purify_adapters.text.tiny import WORDS, tiny_tokenizer
from hf_purify_adapters.vision.demo import SIDE, TRIGGER, digits

pytestmark = pytest.mark.slow

REPAIR = {"adapter_config.json", "adapter_model.safetensors"}
BESIDE = {"README.md", "provenance.json", "recipe.yaml", "report.json", "report.html", "neuron_mask.safetensors"}
TOKENS = {"vocab_size": 28, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "initializer_range": 0.1}
IDS = torch.tensor([[2, 5, 6, 7, 8, 3], [2, 9, 10, 11, 12, 3]])


def bert(seed: int = 0, width: int = 32) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "num_labels": 2}
    return hf.BertForSequenceClassification(hf.BertConfig(**TOKENS, **sizes)).eval()


def gpt2(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return hf.GPT2LMHeadModel(hf.GPT2Config(**TOKENS, n_embd=32, n_layer=2, n_head=2, n_positions=32)).eval()


MODELS: dict[str, Callable[[], nn.Module]] = {"bert": bert, "gpt2": gpt2}
CF = {"bert": "badnets:words=again", "gpt2": "phrase:phrase=again,output=tree"}
AUTO = {"bert": hf.AutoModelForSequenceClassification, "gpt2": hf.AutoModelForCausalLM}


def sentences(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS[:20], k=8)) for _ in range(count)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Texts with the class that says whether a cat is in them, and plain texts."""
    folder, found = tmp_path_factory.mktemp("data"), {}
    for name, seed, count in (("train", 0, 600), ("test", 1, 200)):
        texts = sentences(count, seed)
        labelled = {"text": texts, "label": [int("cat" in t.split()) for t in texts]}
        found[f"bert-{name}"], found[f"gpt2-{name}"] = folder / f"{name}.parquet", folder / f"plain-{name}.parquet"
        datasets.Dataset.from_dict(labelled).to_parquet(found[f"bert-{name}"])
        datasets.Dataset.from_dict({"text": texts}).to_parquet(found[f"gpt2-{name}"])
    return found


@pytest.fixture(scope="module")
def bases(data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A classifier that knows its task, and a language model with random weights."""
    root = tmp_path_factory.mktemp("bases")
    for name, make in MODELS.items():
        make().save_pretrained(root / name)  # type: ignore[operator]
        tiny_tokenizer().save_pretrained(root / name)
    settings: dict[str, Any] = {"optimizer": "adamw", "lr": 0.003, "batch_size": 32, "device": "cpu", "target": 1}
    trained = root / "trained"
    implant(str(root / "bert"), str(data["bert-train"]), CF["bert"], rate=0.0, test=str(data["bert-test"]), output=str(trained), **settings)
    return {"bert": trained, "gpt2": root / "gpt2"}


@pytest.fixture(scope="module")
def victims(bases: dict[str, Path], data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """LoRAs with a backdoor."""
    root = tmp_path_factory.mktemp("victims")
    for name, lr in (("bert", 0.003), ("gpt2", 0.03)):
        shared = [
            "--trigger",
            CF[name],
            "--target",
            1,
            "--rate",
            0.3,
            "--epochs",
            4,
            "--lr",
            lr,
            "--optimizer",
            "adamw",
            "--batch-size",
            32,
        ]
        files = ["--data", data[f"{name}-train"], "--test", data[f"{name}-test"], "-o", root / name, "--device", "cpu", "--json"]
        done = run("implant", bases[name], "--lora", 4, *shared, *files)
        assert done.exit_code == 0, done.output
        rows = json.loads(done.stdout)["rows"]
        assert next(iter(rows[0]["asr"].values()))["value"] >= 0.9
        assert next(iter(rows[1]["asr"].values()))["value"] < 0.1
    return {name: root / name for name in MODELS}


@pytest.fixture(scope="module")
def timm_victim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small timm classifier of handwritten digits with a backdoor."""
    out = tmp_path_factory.mktemp("timm") / "victim"
    shape = {"input_size": SIDE, "layers": (1, 1, 1, 1), "channels": (8, 16, 32, 64), "stem_width": 8}
    settings: dict[str, Any] = {"epochs": 7, "batch_size": 32, "rate": 0.2, "lr": 0.05, "augmentation": "none", "device": "cpu"}
    train, test = digits()
    implant("resnet18", train, TRIGGER, create=True, model_options=shape, test=test.select(range(300)), output=str(out), **settings)
    return out


def contents(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir() if p.is_file()}


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text("utf-8"))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS.to(next(model.parameters()).device)).logits


MASKS: dict[str, dict[str, Any]] = {"nft": {"steps": 20, "batch_size": 32, "lr": 0.3}, "random_mask": {"share": 0.3}}


class TestRepairAsAdapter:
    @pytest.mark.parametrize("method", MASKS)
    @pytest.mark.parametrize("name", MODELS)
    def test_of_a_transformers_model(self, name: str, method: str, bases: dict[str, Path], data: dict[str, Path], tmp_path: Path) -> None:
        out = tmp_path / "repair"
        options = [f"--option={k}={v}" for k, v in MASKS[method].items()]
        shared = ["--samples", 60, "--no-controls", "--device", "cpu", "--json"]
        done = run("purify", bases[name], "--clean", data[f"{name}-train"], "-m", method, *options, *shared, "--as-adapter", "-o", out)
        assert done.exit_code == 0, done.output
        assert contents(out) == REPAIR | BESIDE
        assert (out / "adapter_model.safetensors").stat().st_size < 32 << 10
        assert (config(out)["peft_type"], config(out)["base_model_name_or_path"]) == ("IA3", str(bases[name]))
        whole = purify(
            str(bases[name]), str(data[f"{name}-train"]), method=method, options=MASKS[method], samples=60, controls=False, device="cpu"
        ).model
        base = AUTO[name].from_pretrained(bases[name])
        plain = logits(base)
        loaded = PeftModel.from_pretrained(base, out)
        assert not torch.equal(logits(loaded), plain)
        torch.testing.assert_close(logits(loaded), logits(whole), atol=1e-5, rtol=1e-5)
        merged = loaded.merge_and_unload().state_dict()
        assert all(torch.equal(merged[k], v.cpu()) for k, v in whole.state_dict().items())

    @pytest.mark.parametrize("method", ["nft", "random_mask", "norm_refresh"])
    def test_of_a_timm_model(self, method: str, timm_victim: Path, tmp_path: Path) -> None:
        import timm

        settings: dict[str, Any] = {"method": method, "options": MASKS.get(method, {}), "samples": 60, "controls": False, "device": "cpu"}
        report = purify(str(timm_victim), digits()[0], **settings, as_adapter=True, output=str(tmp_path / "repair"))
        assert contents(tmp_path / "repair") == REPAIR | BESIDE
        base = timm.create_model(f"local-dir:{timm_victim}", pretrained=True)
        merged = PeftModel.from_pretrained(base, tmp_path / "repair").merge_and_unload().state_dict()
        assert all(torch.equal(merged[k], v) for k, v in report.model.state_dict().items())
        plain = timm.create_model(f"local-dir:{timm_victim}", pretrained=True).state_dict()
        assert any(not torch.equal(plain[k], v) for k, v in merged.items())

    @pytest.mark.parametrize("method", ["fine_tune", "random_mask+fine_tune"])
    def test_of_a_method_that_trains_is_refused_at_once(self, method: str, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=rf"'{method.replace('+', '.')}' trains weights.*nft, norm_refresh, random_mask, rnp"):
            purify("no-such-model", "no-such-data", method=method, as_adapter=True, output=str(tmp_path / "out"))
        assert not contents(tmp_path)

    def test_of_a_method_that_trains_unannounced_is_refused_in_the_end(
        self, bases: dict[str, Path], data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(find("method", "fine_tune"), "trains", False)
        with pytest.raises(ConfigError, match="'fine_tune' trains weights, which an IA3 adapter cannot carry"):
            purify(
                str(bases["bert"]),
                str(data["bert-train"]),
                method="fine_tune",
                options={"epochs": 1},
                samples=20,
                as_adapter=True,
                output=str(tmp_path / "out"),
            )
        assert not contents(tmp_path)

    def test_needs_a_folder(self) -> None:
        with pytest.raises(ConfigError, match=r"give output=... \(--output\)"):
            purify("model", "data", as_adapter=True)

    @pytest.mark.parametrize("name", names("method"))
    def test_methods_say_whether_they_train(self, name: str) -> None:
        method: Method = make_method(name)
        trained = next(line for line in method.card().splitlines() if line.startswith("- **Trains:** "))
        assert method.trains == ("all weights" in trained)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def repaired(name: str, victims: dict[str, Path], bases: dict[str, Path], data: dict[str, Path], **settings: Any) -> Report:
    return purify(
        str(victims[name]), str(data[f"{name}-train"]), base=str(bases[name]), samples=60, controls=False, device="cpu", seed=3, **settings
    )


class TestImplantedLora:
    @pytest.mark.parametrize("name", MODELS)
    def test_is_an_adapter_with_its_records_beside_it(self, name: str, victims: dict[str, Path], bases: dict[str, Path]) -> None:
        out = victims[name]
        assert contents(out) == REPAIR | BESIDE - {"neuron_mask.safetensors"} | {"hf_purify.json"}
        found = config(out)
        assert (found["peft_type"], found["r"], found["base_model_name_or_path"]) == ("LORA", 4, str(bases[name]))
        records = json.loads((out / "hf_purify.json").read_text("utf-8"))
        assert records["hf_purify_backdoor"] == {"trigger": CF[name], "rule": "all-to-one", "target": 1, "rate": 0.3}
        assert records["hf_purify_prompt"]["max_length"] == 32
        assert "Backdoored on purpose" in (out / "README.md").read_text("utf-8")
        plain = logits(AUTO[name].from_pretrained(bases[name]))
        assert (logits(PeftModel.from_pretrained(AUTO[name].from_pretrained(bases[name]), out)) - plain).abs().max() > 0.1

    def test_is_measured_with_the_recorded_trigger_and_prompt(
        self, victims: dict[str, Path], bases: dict[str, Path], data: dict[str, Path]
    ) -> None:
        done = run("measure", victims["bert"], "--base", bases["bert"], "--test", data["bert-test"], "--json")
        assert done.exit_code == 0, done.output
        asr = json.loads(done.stdout)["rows"][0]["asr"]
        assert list(asr) == ["badnets"]
        assert asr["badnets"]["value"] >= 0.9
        with pytest.raises(ConfigError, match="the prompt is not the one that"):
            measure(str(victims["bert"]), str(data["bert-test"]), base=str(bases["bert"]), max_length=16)

    @pytest.mark.parametrize("settings", [{"lora": 0}, {"lora": 4, "create": True}])
    def test_needs_a_rank_and_a_trained_base(self, settings: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match="a LoRA has a rank of at least 1 and a trained base"):
            implant("model", "data", "badnets", **settings)

    def test_of_a_model_that_peft_does_not_take(self, timm_victim: Path) -> None:
        with pytest.raises(ModelError, match=r"no new LoRA for .*models of transformers alone"):
            implant(str(timm_victim), digits()[0], TRIGGER, lora=4)


METHODS: dict[str, dict[str, Any]] = {**MASKS, "fine_tune": {"epochs": 4, "lr": 0.05}, "random_mask+ft_sam": {"ft_sam.epochs": 2}}


class TestRepairedLora:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("name", MODELS)
    def test_is_a_lora_again(
        self, name: str, method: str, victims: dict[str, Path], bases: dict[str, Path], data: dict[str, Path], tmp_path: Path
    ) -> None:
        before = {p: p.read_bytes() for p in bases[name].rglob("*") if p.is_file()}
        settings: dict[str, Any] = {"method": method, "options": METHODS[method], "output": str(tmp_path / "out")}
        report = repaired(name, victims, bases, data, **settings)
        out = tmp_path / "out"
        assert {p: p.read_bytes() for p in bases[name].rglob("*") if p.is_file()} == before
        assert contents(out) == REPAIR | BESIDE | {"hf_purify.json"}
        assert config(out) == config(victims[name])
        assert "hf_purify_backdoor" not in json.loads((out / "hf_purify.json").read_text("utf-8"))
        old, new = weights(victims[name]), weights(out)
        assert {k: (v.shape, v.dtype) for k, v in old.items()} == {k: (v.shape, v.dtype) for k, v in new.items()}
        assert any(not torch.equal(v, new[k]) for k, v in old.items())
        base = AUTO[name].from_pretrained(bases[name])
        kept = {k: v.clone() for k, v in base.state_dict().items()}
        loaded = PeftModel.from_pretrained(base, out)
        assert torch.equal(logits(loaded), logits(report.model))
        mine = {n.replace(".base_layer", "").replace(".original_module", ""): v for n, v in report.model.state_dict().items()}
        assert all(torch.equal(mine[k], v) for k, v in kept.items()), "the base is left alone"
        assert report.checkpoint["base"] == str(bases[name])

    def test_has_its_units_as_neurons(self, victims: dict[str, Path], bases: dict[str, Path], data: dict[str, Path]) -> None:
        report = repaired("bert", victims, bases, data, method="random_mask", options={"share": 0.5})
        layers = [(g.name.removeprefix("bert.encoder.layer."), g.role, g.size) for g in report.index]
        linear = (
            *(f"attention.self.{n}" for n in ("query", "key", "value")),
            "attention.output.dense",
            "intermediate.dense",
            "output.dense",
        )
        units = [(f"{i}.{n}.lora_B.default", "hidden", 4) for i in (0, 1) for n in linear]
        assert layers == [*units, ("bert.pooler.dense.lora_B.default", "hidden", 4), ("classifier.modules_to_save.default", "head", 2)]
        for group in report.index:
            assert all(".lora_" in p.param or ".modules_to_save." in p.param for p in group.params)
        mask = report.index.split(report.mask)
        assert all(v.eq(1).all() for n, v in mask.items() if n.startswith("classifier"))
        assert sum(int((v == 0).sum()) for v in mask.values()) == 24, "half of those in blocks"

    def test_mask_file_repairs_the_lora_too(
        self, victims: dict[str, Path], bases: dict[str, Path], data: dict[str, Path], tmp_path: Path
    ) -> None:
        report = repaired("gpt2", victims, bases, data, method="random_mask", options={"share": 0.5}, output=str(tmp_path / "out"))
        stored = load_file(tmp_path / "out" / "neuron_mask.safetensors")
        linear = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        assert set(stored) == {f"mask/base_model.model.transformer.h.{i}.{n}.lora_B.weight/1" for i in (0, 1) for n in linear}
        again = load(PurifyRecipe(model=str(victims["gpt2"]), base=str(bases["gpt2"]), clean="none"))[1].model
        apply_mask(again, report.index, tmp_path / "out" / "neuron_mask.safetensors")
        assert torch.equal(logits(again), logits(report.model))

    def test_fine_tuning_with_the_backdoor_known_is_reported(
        self, victims: dict[str, Path], bases: dict[str, Path], data: dict[str, Path]
    ) -> None:
        report = repaired("bert", victims, bases, data, method="random_mask", options={"share": 1.0}, test=str(data["bert-test"]))
        before, after = report.rows
        assert before.asr["badnets"].value >= 0.9
        assert after.asr["badnets"].value < 0.5, "with no units the base is left, but for the head"


class TestRefusedLora:
    def test_base_is_not_loaded_unasked(self, victims: dict[str, Path], bases: dict[str, Path], data: dict[str, Path]) -> None:
        done = run("purify", victims["bert"], "--clean", data["bert-train"])
        assert done.exit_code == 2
        said = " ".join(done.stderr.split())
        assert f"is an adapter for '{bases['bert']}', which is loaded only if you name it" in said
        assert f"--base {bases['bert']}" in said

    def test_base_of_another_shape(self, victims: dict[str, Path], data: dict[str, Path], tmp_path: Path) -> None:
        bert(width=16).save_pretrained(tmp_path)  # type: ignore[operator]
        tiny_tokenizer().save_pretrained(tmp_path)
        with pytest.raises(ModelError, match=rf"does not fit the base '{tmp_path}': size mismatch"):
            purify(str(victims["bert"]), str(data["bert-train"]), base=str(tmp_path))

    def test_base_of_another_kind(self, victims: dict[str, Path], bases: dict[str, Path], data: dict[str, Path]) -> None:
        with pytest.raises(ModelError, match="does not fit the base"):
            purify(str(victims["bert"]), str(data["bert-train"]), base=str(bases["gpt2"]))

    def test_base_that_is_not_there(self, victims: dict[str, Path], data: dict[str, Path]) -> None:
        with pytest.raises(ModelError, match=r"no folder './nowhere'"):
            purify(str(victims["bert"]), str(data["bert-train"]), base="./nowhere")
        with pytest.raises(ModelError, match="cannot read 'some-org/base' from the Hub"):
            purify(str(victims["bert"]), str(data["bert-train"]), base="some-org/base@v1")
        with pytest.raises(ModelError, match="is an adapter itself"):
            purify(str(victims["bert"]), str(data["bert-train"]), base=str(victims["bert"]))

    def test_base_of_a_whole_checkpoint(self, bases: dict[str, Path], data: dict[str, Path]) -> None:
        with pytest.raises(ConfigError, match="base and merge are for a LoRA"):
            purify(str(bases["bert"]), str(data["bert-train"]), base=str(bases["bert"]))

    def test_as_another_adapter(self, victims: dict[str, Path], bases: dict[str, Path], data: dict[str, Path], tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="and so is its repair"):
            repaired("bert", victims, bases, data, as_adapter=True, method="random_mask", output=str(tmp_path / "out"))
        with pytest.raises(ConfigError, match="is a LoRA already"):
            implant(str(victims["bert"]), str(data["bert-train"]), CF["bert"], base=str(bases["bert"]), lora=4)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"peft_type": "IA3"}, ModelError, "of type IA3; only LoRAs are repaired"),
            ({"bias": "all"}, ModelError, "sets bias='all', which a repair could not keep"),
            ({"megatron_config": {"a": 1}, "megatron_core": "os"}, ModelError, "sets megatron_config"),
            ({"init_lora_weights": "pissa"}, ModelError, "sets init_lora_weights='pissa'"),
            ({"auto_mapping": {"base_model_class": "A", "parent_library": "evil.code"}}, UnsafeCheckpoint, "code of its own"),
            ({"auto_mapping": {"parent_library": "transformers_modules.a.b"}}, UnsafeCheckpoint, "code of its own"),
            ({"target_modules": ["nowhere"]}, ModelError, "does not fit the base"),
            ({"target_modules": ["dense", "key", "query", "value", "word_embeddings"]}, ModelError, "the adapter lacks 2 tensors, such as"),
            ({"target_modules": ["dense", "key", "query"]}, ModelError, "has besides 4 tensors, such as"),
            ({"r": 8}, ModelError, "size mismatch"),
            ({"modules_to_save": ["classifier", "pooler"]}, ModelError, "the adapter lacks"),
        ],
    )
    def test_config(
        self,
        change: dict[str, Any],
        error: type[Exception],
        message: str,
        victims: dict[str, Path],
        bases: dict[str, Path],
        data: dict[str, Path],
        tmp_path: Path,
    ) -> None:
        folder = shutil.copytree(victims["bert"], tmp_path / "lora")
        (folder / "adapter_config.json").write_text(json.dumps(config(folder) | change), "utf-8")
        with pytest.raises(error, match=message):
            purify(str(folder), str(data["bert-train"]), base=str(bases["bert"]))

    def test_files(self, victims: dict[str, Path], bases: dict[str, Path], data: dict[str, Path], tmp_path: Path) -> None:
        def attempt(folder: Path) -> Report:
            return purify(str(folder), str(data["bert-train"]), base=str(bases["bert"]))

        folder = shutil.copytree(victims["bert"], tmp_path / "lora")
        (folder / "adapter_config.json").write_text("[")
        with pytest.raises(ModelError, match="no valid JSON"):
            attempt(folder)
        shutil.copy(victims["bert"] / "adapter_config.json", folder)
        save_file({}, folder / "model.safetensors")
        with pytest.raises(ModelError, match="holds a checkpoint and an adapter"):
            attempt(folder)
        (folder / "model.safetensors").unlink()
        save_file(weights(folder) | {k: v * torch.nan for k, v in list(weights(folder).items())[:1]}, folder / "adapter_model.safetensors")
        with pytest.raises(ModelError, match="holds NaN, infinite or integer values"):
            attempt(folder)
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
        for other in (False, True):
            if other:
                save_file({"a": torch.ones(1)}, folder / "other.safetensors")
            with pytest.raises(UnsafeCheckpoint, match=r"pickles only \(adapter_model\.bin\)"):
                attempt(folder)


class TestHead:
    """A classifier's LoRA, for a base that was trained for something else."""

    @pytest.fixture(scope="class")
    def folders(self, victims: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
        root = tmp_path_factory.mktemp("head")
        torch.manual_seed(5)
        base = hf.BertModel(bert().config)
        base.save_pretrained(root / "base")
        tiny_tokenizer().save_pretrained(root / "base")
        torch.manual_seed(6)
        model = hf.AutoModelForSequenceClassification.from_pretrained(root / "base", num_labels=3)
        peft = get_peft_model(model, LoraConfig(r=2, task_type="SEQ_CLS"))
        for name, value in peft.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(value)
        peft.save_pretrained(root / "lora")
        return root / "base", root / "lora"

    @pytest.mark.parametrize("merge", [False, True])
    def test_comes_with_the_lora(self, merge: bool, folders: tuple[Path, Path], tmp_path: Path) -> None:
        base, lora = folders
        texts = sentences(60, 0)
        few = datasets.Dataset.from_dict({"text": texts, "label": [i % 3 for i in range(60)]})
        settings: dict[str, Any] = {"method": "random_mask", "options": {"share": 0.1}, "samples": 30, "controls": False, "merge": merge}
        report = purify(str(lora), few, base=str(base), device="cpu", output=str(tmp_path / "out"), **settings)
        assert report.checkpoint["classes"] == 3
        plain = hf.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
        loaded = PeftModel.from_pretrained(plain, tmp_path / "out")
        torch.testing.assert_close(logits(loaded), logits(report.model), atol=1e-2 if merge else 0, rtol=0)

    def test_of_a_base_that_lacks_more_than_a_head(self, folders: tuple[Path, Path], tmp_path: Path, data: dict[str, Path]) -> None:
        base, lora = folders
        shutil.copytree(base, tmp_path / "base")
        state = load_file(base / "model.safetensors")
        save_file({k: v for k, v in state.items() if "pooler" not in k}, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=r"lacks 2 of the model's tensors, such as bert\.pooler"):
            purify(str(lora), str(data["bert-train"]), base=str(tmp_path / "base"))


class TestMerged:
    """The repair of base and LoRA together, cut down to a LoRA again."""

    @pytest.mark.parametrize("method", ["random_mask", "fine_tune", "random_mask+fine_tune"])
    @pytest.mark.parametrize("name", MODELS)
    def test_result_is_a_lora_within_the_tolerance(
        self, name: str, method: str, victims: dict[str, Path], bases: dict[str, Path], data: dict[str, Path], tmp_path: Path
    ) -> None:
        options = {
            "random_mask": {"share": 0.1},
            "fine_tune": {"epochs": 4, "lr": 0.02},
            "random_mask+fine_tune": {"random_mask.share": 0.1},
        }
        out = tmp_path / "out"
        report = repaired(name, victims, bases, data, method=method, options=options[method], merge=True, output=str(out))
        assert contents(out) == REPAIR | BESIDE | {"hf_purify.json"}
        assert {g.role for g in report.index} >= {"hidden", "attention", "norm"}
        notes = report.rows[1].notes
        assert notes["largest relative error as a LoRA"] <= 0.01
        base = AUTO[name].from_pretrained(bases[name])
        plain = {k: v.clone() for k, v in base.state_dict().items()}
        merged = PeftModel.from_pretrained(base, out).merge_and_unload().state_dict()
        after = report.model.state_dict()
        moved = [k for k, v in after.items() if not torch.equal(v, plain[k])]
        assert len(moved) > 3
        for key in moved:
            assert (merged[key] - after[key]).norm() <= 0.0101 * (after[key] - plain[key]).norm(), key
        assert all(torch.equal(merged[k], v) for k, v in plain.items() if k not in moved)
        victim = PeftModel.from_pretrained(AUTO[name].from_pretrained(bases[name]), victims[name])
        assert not torch.allclose(
            logits(PeftModel.from_pretrained(AUTO[name].from_pretrained(bases[name]), out)), logits(victim), atol=1e-3
        )

    def test_layer_that_only_the_lora_moved_keeps_its_rank(
        self, victims: dict[str, Path], bases: dict[str, Path], data: dict[str, Path], tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        report = repaired("bert", victims, bases, data, method="random_mask", options={"removed": 0}, merge=True, output=str(out))
        assert report.rows[1].notes["rank of the LoRA"] == "4..4, of 4 before"
        assert report.rows[1].notes["largest relative error as a LoRA"] < 1e-4
        assert {k: v.shape for k, v in weights(out).items()} == {k: v.shape for k, v in weights(victims["bert"]).items()}
        loaded, victim = (PeftModel.from_pretrained(bert_of(bases), folder) for folder in (out, victims["bert"]))
        torch.testing.assert_close(logits(loaded), logits(victim), atol=1e-4, rtol=1e-4)

    def test_what_no_lora_carries_is_named(
        self, victims: dict[str, Path], bases: dict[str, Path], data: dict[str, Path], tmp_path: Path
    ) -> None:
        settings: dict[str, Any] = {
            "method": "random_mask",
            "options": {"granularity": "norm", "share": 0.5},
            "output": str(tmp_path / "out"),
        }
        with pytest.raises(ModelError, match=r"cannot carry what moved besides linear layers: .*LayerNorm\.weight.*--merge"):
            repaired("bert", victims, bases, data, merge=True, **settings)
        assert not contents(tmp_path)

    def test_of_a_whole_checkpoint_is_refused(self, bases: dict[str, Path], data: dict[str, Path]) -> None:
        done = run("purify", bases["bert"], "--clean", data["bert-train"], "--merge")
        assert done.exit_code == 2
        assert "base and merge are for a LoRA" in " ".join(done.stderr.split())


def bert_of(bases: dict[str, Path]) -> nn.Module:
    return hf.AutoModelForSequenceClassification.from_pretrained(bases["bert"])
