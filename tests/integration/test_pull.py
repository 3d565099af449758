"""The command line against a Hub on the loopback: the real client, over HTTP, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import Hub, running
from safetensors.torch import load_file

from hf_purify_adapters.vision.demo import SIDE, digits

pytestmark = pytest.mark.slow

SECRET = "hf_neverToBeSeenAnywhere0123456789"
Run = Callable[..., subprocess.CompletedProcess[str]]


def resnet(folder: Path, seed: int) -> Path:
    """A random transformers checkpoint of ten digits."""
    from transformers import AutoModelForImageClassification, ResNetConfig, ViTImageProcessor

    names = {i: str(i) for i in range(10)}
    torch.manual_seed(seed)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", id2label=names, label2id={v: k for k, v in names.items()}
    )
    AutoModelForImageClassification.from_config(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


def timm_resnet(folder: Path) -> Path:
    """A random timm checkpoint of ten digits."""
    import timm

    torch.manual_seed(0)
    small: dict[str, Any] = {"layers": (1, 1, 1, 1), "channels": (8, 16, 32, 64), "stem_width": 8}
    overlay = {"input_size": (3, SIDE, SIDE), "crop_pct": 1.0}
    model = timm.create_model("resnet18", num_classes=10, pretrained_cfg_overlay=overlay, **small)
    timm.models.save_for_hf(model, str(folder), model_config={"model_args": small}, safe_serialization=True)
    return folder


def vit_lora(base: Path, lora: Path) -> None:
    """A random transformer of ten digits, and a LoRA for it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageClassification, ViTConfig, ViTImageProcessor

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": SIDE,
        "patch_size": 8,
    }
    names = {i: str(i) for i in range(10)}
    model = AutoModelForImageClassification.from_config(ViTConfig(**sizes, id2label=names, label2id={v: k for k, v in names.items()}))
    model.save_pretrained(base)
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(base)
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"]))
    for name, value in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value)
    peft.peft_config["default"].base_model_name_or_path = "some-org/vit"
    peft.save_pretrained(lora)


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with running(token=SECRET) as hub:
        yield hub


@pytest.fixture(scope="module")
def commits(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the Hub holds: a transformers model of two commits, a timm model under two names, digits as Parquet files."""
    folder = tmp_path_factory.mktemp("hub")
    found = {"old": hub.push("models", "some-org/resnet", resnet(folder / "resnet", seed=0), ref="v1")}
    (folder / "resnet" / "pytorch_model.bin").write_bytes(b"a pickle that must not be fetched")
    (folder / "resnet" / "modeling.py").write_text("raise SystemExit('run')\n")
    found["new"] = hub.push("models", "some-org/resnet", resnet(folder / "resnet", seed=1))
    network = timm_resnet(folder / "timm")
    found["timm"] = hub.push("models", "some-org/timm-resnet", network)
    found["named"] = hub.push("models", "timm/resnet18.a1_in1k", network)
    (folder / "digits" / "data").mkdir(parents=True)
    train, test = digits()
    train.select(range(120)).to_parquet(folder / "digits" / "data" / "train-00000-of-00001.parquet")
    test.select(range(80)).to_parquet(folder / "digits" / "data" / "test-00000-of-00001.parquet")
    found["digits"] = hub.push("datasets", "some-org/digits", folder / "digits")
    (folder / "shards" / "data").mkdir(parents=True)
    for i in range(20):
        train.select(range(20 * i, 20 * i + 20)).to_parquet(folder / "shards" / "data" / f"train-{i:05}-of-00020.parquet")
    hub.push("datasets", "some-org/shards", folder / "shards")
    for i, row in enumerate(train.select(range(120))):
        (folder / "pictures" / "train" / str(row["label"])).mkdir(parents=True, exist_ok=True)
        row["image"].save(folder / "pictures" / "train" / str(row["label"]) / f"{i}.png")
    hub.push("datasets", "some-org/pictures", folder / "pictures")
    vit_lora(folder / "vit", folder / "lora")
    found["vit"] = hub.push("models", "some-org/vit", folder / "vit", ref="v1")
    found["lora"] = hub.push("models", "some-org/lora", folder / "lora")
    (folder / "pickle").mkdir()
    (folder / "pickle" / "config.json").write_text('{"model_type": "resnet"}')
    (folder / "pickle" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    hub.push("models", "some-org/pickle", folder / "pickle")
    return found


@pytest.fixture
def run(hub: Hub, commits: dict[str, str], tmp_path: Path) -> Run:
    """Run `hf-purify` with this Hub, an empty cache and a token in the environment."""
    hub.requests.clear()
    keep = {k: v for k, v in os.environ.items() if not k.endswith("_OFFLINE")}

    def call(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
        own = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": SECRET}
        command = [sys.executable, "-m", "hf_purify", *map(str, arguments)]
        return subprocess.run(command, env=keep | own | variables, capture_output=True, text=True, timeout=300, check=False)

    return call


QUICK = ("--clean", "some-org/digits", "--method", "random_mask", "--samples", 40, "--no-controls", "--device", "cpu")


def provenance(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text())


def test_an_estimate_fetches_the_config_alone(run: Run, hub: Hub, commits: dict[str, str]) -> None:
    done = run("estimate", "some-org/resnet", "--json", "--processes", 1, "--batch-size", 4)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["revision"] == commits["new"]
    assert hub.fetched() == {"config.json"}
    old = json.loads(run("estimate", "some-org/resnet", "--revision", "v1", "--json", "--processes", 1).stdout)
    assert old["revision"] == commits["old"]
    missing = run("estimate", "some-org/nothing")
    assert missing.returncode == 2
    assert "cannot read the config.json of 'some-org/nothing' from the Hub" in missing.stderr


def test_model_and_data_of_the_hub(run: Run, hub: Hub, commits: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("purify", "some-org/resnet", *QUICK, "--split", "train", "--test", "some-org/digits", "--test-split", "test", "-o", out)
    assert done.returncode == 0, done.stderr
    report = provenance(out)
    assert report["checkpoint"]["source"] == "some-org/resnet"
    assert report["checkpoint"]["revision"] == commits["new"]
    assert report["clean"] | {"source": "some-org/digits", "split": "train", "samples": 40} == report["clean"]
    assert report["rows"][0]["clean_accuracy"]["n"] == 80
    assert not {"pytorch_model.bin", "modeling.py"} & hub.fetched()
    models = [header for _, path, header in hub.requests if "/datasets/" not in path]
    assert models
    assert models == [None] * len(models), "a public model is read with no token"
    shown = done.stdout + done.stderr + "".join(p.read_text("latin-1") for p in out.rglob("*") if p.is_file())
    assert SECRET not in shown


def test_of_a_stream_only_what_is_looked_at_is_fetched(run: Run, hub: Hub, tmp_path: Path) -> None:
    """Of Parquet files those that are opened, of single pictures those that are drawn; no copy is kept on disk."""
    out = tmp_path / "out"
    streaming = "--streaming", "--stream-rows", 60, "--test", "some-org/shards", "--test-samples", 20
    done = run("purify", "some-org/resnet", *QUICK, "--clean", "some-org/pictures", *streaming, "-o", out)
    assert done.returncode == 0, done.stderr
    report = provenance(out)
    assert report["clean"] | {"source": "some-org/pictures", "samples": 40, "rows_read": 60} == report["clean"]
    assert report["rows"][0]["clean_accuracy"]["n"] == 20
    assert any("test samples were drawn from 60 rows of a stream" in w for w in report["warnings"])
    fetched = [Path(path).suffix for path in hub.fetched()]
    assert fetched.count(".png") == 40, "of 120"
    assert 1 <= fetched.count(".parquet") <= 4, "of 20"
    assert not [p for p in (tmp_path / "home").rglob("*") if p.suffix in (".parquet", ".arrow", ".png")]


def test_a_revision_is_the_one_that_is_repaired(run: Run, commits: dict[str, str], tmp_path: Path) -> None:
    kept = []
    for revision, expected in (("v1", "old"), (commits["new"], "new")):
        out = tmp_path / expected
        done = run("purify", "some-org/resnet", "--revision", revision, *QUICK, "-o", out)
        assert done.returncode == 0, done.stderr
        assert provenance(out)["checkpoint"]["revision"] == commits[expected]
        kept.append(load_file(out / "model.safetensors"))
    assert any(not torch.equal(v, kept[1][k]) for k, v in kept[0].items())


@pytest.mark.parametrize(
    ("name", "key"), [("hf-hub:some-org/timm-resnet", "timm"), ("some-org/timm-resnet", "timm"), ("resnet18.a1_in1k", "named")]
)
def test_timm_models_by_hub_id_and_by_name(name: str, key: str, run: Run, commits: dict[str, str], tmp_path: Path) -> None:
    import timm

    out = tmp_path / "out"
    done = run("purify", name, *QUICK, "-o", out)
    assert done.returncode == 0, done.stderr
    report = provenance(out)
    assert report["checkpoint"] | {"source": name, "kind": "timm", "revision": commits[key]} == report["checkpoint"]
    assert timm.create_model(f"local-dir:{out}", pretrained=True).num_classes == 10


def test_repair_as_an_adapter_names_its_base_and_commit(run: Run, commits: dict[str, str], tmp_path: Path) -> None:
    for name, base, key in (("some-org/resnet", "some-org/resnet", "new"), ("resnet18.a1_in1k", "timm/resnet18.a1_in1k", "named")):
        out = tmp_path / key
        done = run("purify", name, *QUICK, "--as-adapter", "-o", out)
        assert done.returncode == 0, done.stderr
        config = json.loads((out / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["revision"]) == (base, commits[key])


def test_base_of_a_lora_is_fetched_when_it_is_named(run: Run, hub: Hub, commits: dict[str, str], tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageClassification

    done = run("purify", "some-org/lora", *QUICK, "-o", tmp_path / "out")
    assert done.returncode == 2, done.stderr
    assert "--base some-org/vit" in done.stderr
    assert not [path for _, path, _ in hub.requests if "some-org/vit" in path]
    done = run("purify", "some-org/lora", "--base", "some-org/vit@v1", *QUICK, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    report = provenance(tmp_path / "out")
    known = {"source": "some-org/lora", "revision": commits["lora"], "base": f"some-org/vit@{commits['vit']}"}
    assert report["checkpoint"] | known == report["checkpoint"]
    assert {layer["name"].rpartition(".lora_")[2] for layer in report["layers"]} == {"B.default", "classifier.modules_to_save.default"}
    vit_lora(tmp_path / "vit", tmp_path / "lora")
    inputs = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    logits = []
    for folder in (tmp_path / "out", tmp_path / "lora"):
        model = PeftModel.from_pretrained(AutoModelForImageClassification.from_pretrained(tmp_path / "vit"), folder).eval()
        logits.append(model(pixel_values=inputs).logits)
    assert torch.equal(*logits), "of sixteen units none was removed"


def test_offline_the_cached_model_is_taken(run: Run, hub: Hub, commits: dict[str, str], tmp_path: Path) -> None:
    assert run("purify", "some-org/resnet", *QUICK, "-o", tmp_path / "online").returncode == 0
    hub.requests.clear()
    done = run("purify", "some-org/resnet", *QUICK, "-o", tmp_path / "offline", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert not hub.requests
    assert provenance(tmp_path / "offline")["checkpoint"]["revision"] == commits["new"]
    first, second = (load_file(tmp_path / n / "model.safetensors") for n in ("online", "offline"))
    assert all(torch.equal(v, second[k]) for k, v in first.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("some-org/none", *QUICK), "cannot read 'some-org/none' from the Hub"),
        (("some-org/resnet", "--revision", "v9", *QUICK), "cannot read 'some-org/resnet' from the Hub"),
        (("some-org/pickle", *QUICK), "pickles only (pytorch_model.bin)"),
        (("some-org/resnet", *QUICK, "--clean", "some-org/none"), "cannot read the data set 'some-org/none'"),
        (("some-org/resnet", *QUICK, "--split", "trian"), "no split 'trian'; did you mean 'train'?"),
    ],
)
def test_what_the_hub_does_not_have(arguments: tuple[object, ...], message: str, run: Run, hub: Hub, tmp_path: Path) -> None:
    done = run("purify", *arguments, "-o", tmp_path / "out")
    assert done.returncode == 2, done.stderr
    assert message in " ".join(done.stderr.split())
    assert SECRET not in done.stdout + done.stderr
    assert not [p for p in tmp_path.iterdir() if p.name != "home"]
    assert "pytorch_model.bin" not in hub.fetched()
