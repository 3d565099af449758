"""Input that cannot be used: a clear error of the right kind, an exit code, and nothing half-written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from commands import run
from PIL import Image
from refusals import Case, attempt
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.transforms import ToTensor

from hf_purify import implant, measure, purify
from hf_purify.errors import ConfigError, DataError, Diverged, ModelError, OutputError, PurifyError, UnknownName, UnsafeCheckpoint

CLASSES = 4


def images(labels: list[Any], mode: str = "RGB", names: list[str] | None = None) -> datasets.Dataset:
    shape = (16, 16) if mode == "L" else (16, 16, 3)
    pixels = np.random.default_rng(0).integers(0, 256, (len(labels), *shape), dtype=np.uint8)
    label = datasets.ClassLabel(names=names) if names else datasets.Value("string" if labels and isinstance(labels[0], str) else "int64")
    features = datasets.Features({"image": datasets.Image(), "label": label})
    return datasets.Dataset.from_dict({"image": [Image.fromarray(p) for p in pixels], "label": labels}, features=features)


GOOD = images([i % CLASSES for i in range(24)])


def module() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(6, CLASSES))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good transformers checkpoint."""
    from transformers import AutoModelForImageClassification, ResNetConfig, ViTImageProcessor

    folder = tmp_path_factory.mktemp("good") / "model"
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", id2label=dict(enumerate("abcd")))
    AutoModelForImageClassification.from_config(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "clean.parquet"
    GOOD.to_parquet(file)
    return file


def nan_model() -> nn.Module:
    model = module()
    with torch.no_grad():
        model[5].weight[0, 0] = float("nan")
    return model


def integer_model() -> nn.Module:
    model = module()
    model.add_module("extra", nn.Module())
    model.extra.register_buffer("weight", torch.ones(2, 2, dtype=torch.int8))
    return model


class NoNeurons(nn.Module):
    """Nothing that could be masked, tuned or reset."""

    num_classes = CLASSES

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)) @ torch.ones(3, CLASSES)


WITHOUT_IMAGES = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
TWO_LABELS = GOOD.cast_column("label", datasets.ClassLabel(num_classes=CLASSES)).add_column("fine", [0] * 24)
TWO_LABELS = TWO_LABELS.cast_column("fine", datasets.ClassLabel(num_classes=2))

TEST_ONLY = datasets.DatasetDict({"test": GOOD})

CASES: dict[str, Case] = {
    "unknown method": Case(UnknownName, "did you mean 'nft'", {"method": "ntf"}),
    "unknown option": Case(ConfigError, "did you mean 'steps'", {"options": {"stpes": 3}}),
    "option out of range": Case(ConfigError, "steps must be at least 1", {"options": {"steps": 0}}),
    "unknown setting": Case(ConfigError, "did you mean 'samples'", {"sampels": 3}),
    "unknown adapter": Case(UnknownName, "did you mean 'vision'", {"adapter": "visoin"}),
    "unknown trigger": Case(UnknownName, "did you mean 'badnets'", {"triggers": ["badnet"], "test": GOOD}),
    "unknown trigger option": Case(PurifyError, "did you mean 'size'", {"triggers": ["badnets:sise=3"], "test": GOOD}),
    "trigger without test data": Case(ConfigError, "--test", {"triggers": ["badnets"]}),
    "unknown rule": Case(UnknownName, "did you mean 'all-to-one'", {"rule": "all-to-on", "triggers": ["badnets"], "test": GOOD}),
    "target outside": Case(ConfigError, r"0\.\.3, got 9", {"target": 9, "triggers": ["badnets"], "test": GOOD}),
    "no processor": Case(ModelError, "needs a processor or a transform", {"processor": None}),
    "processor of no use": Case(ModelError, "expected a processor or a callable", {"processor": 3}),
    "missing model": Case(ModelError, "no folder './nowhere'", {"model": "./nowhere"}),
    "NaN weights": Case(ModelError, "NaN or infinite values in '5.weight'", {"model": nan_model}),
    "quantized weights": Case(ModelError, r"type torch\.int8.*quantized", {"model": integer_model}),
    "missing data": Case(DataError, "cannot read the data set", {"clean": "./no-such-data"}),
    "empty data": Case(DataError, "the clean set is empty", {"clean": images([])}),
    "single class": Case(DataError, r"a single class \(1\)", {"clean": images([1] * 6)}),
    "fewer samples than classes": Case(DataError, "3 samples are fewer than the 4 classes", {"samples": 3}),
    "no samples": Case(ConfigError, "samples must be at least 1", {"samples": 0}),
    "label outside": Case(DataError, r"label 7 is outside the model's range 0\.\.3", {"clean": images([0, 1, 2, 3, 7])}),
    "negative label": Case(DataError, "label -1 is outside", {"clean": images([0, 1, 2, 3, -1])}),
    "missing label": Case(DataError, "missing labels", {"clean": images([0, 1, 2, 3, None])}),
    "other class names": Case(DataError, "class names do not match.*'cat'", {"clean": images([0, 1], names=["cat", "a"])}),
    "unknown label name": Case(DataError, "label 'cow' is none of the model's classes: a, b, c, d", {"clean": images(["a", "b", "cow"])}),
    "grey images": Case(DataError, r"grey ones \(mode L\).*--to-rgb", {"clean": images([0, 1, 2, 3] * 2, mode="L")}),
    "no image column": Case(DataError, "no image column found", {"clean": WITHOUT_IMAGES}),
    "no such column": Case(DataError, "no column 'lable'; did you mean 'label'", {"columns": {"label": "lable"}}),
    "two label columns": Case(DataError, "several label columns found", {"clean": TWO_LABELS}),
    "no such split": Case(
        DataError, "no split 'tset'; did you mean 'test'", {"clean": datasets.DatasetDict({"test": GOOD}), "split": "tset"}
    ),
    "no neurons of a kind": Case(ModelError, "no neurons of kind 'attention'.*has head, norm", {"options": {"granularity": "attention"}}),
    "no neurons at all": Case(ModelError, "no neurons found", {"model": NoNeurons}),
    "bad precision": Case(ConfigError, "precision must be", {"precision": "int4"}),
    "bad split": Case(ConfigError, r"held_out must be in \[0, 1\)", {"held_out": 1.0}),
    "bad type": Case(ConfigError, "setting 'samples' must be int or None, got str", {"samples": "many"}),
}


GIVEN = {"model": module, "clean": GOOD, "method": "nft", "samples": 16, "processor": ToTensor(), "labels": list("abcd")}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_bad_input_is_a_clear_error_and_leaves_nothing(case: Case, tmp_path: Path) -> None:
    case.check(tmp_path, **GIVEN)


def test_good_input_is_no_error(tmp_path: Path) -> None:
    """Otherwise the table above would prove nothing."""
    attempt(tmp_path / "out", **GIVEN, options={"steps": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def edited(checkpoint: Path, folder: Path, name: str = "config.json", **change: Any) -> Path:
    """A copy of a checkpoint with some keys of one of its JSON files changed."""
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    content = json.loads((folder / name).read_text()) | change
    (folder / name).write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return folder


def without_a_tensor(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    stored.pop(next(k for k in stored if k.endswith("weight") and "classifier" in k))
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


def other_shape(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    key = next(k for k in stored if k.endswith("weight") and "classifier" in k)
    stored[key] = torch.zeros(7, stored[key].shape[1])
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


def with_nan(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    next(v for v in stored.values() if v.is_floating_point()).fill_(float("nan"))
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def without_processor(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()


FOLDERS: dict[str, tuple[dict[str, Any], Callable[[Path], None] | None, type[PurifyError], str]] = {
    "a pickle": ({}, pickled, UnsafeCheckpoint, "as pickles only.*safetensors/convert"),
    "remote code": ({"auto_map": {"AutoModel": "code.Net"}}, None, UnsafeCheckpoint, "wants to run its own code"),
    "a language model": (
        {"architectures": ["BertForMaskedLM"]},
        None,
        ModelError,
        "of no kind that can be repaired: its config names BertForMaskedLM; there is .*image-classification",
    ),
    "a text type": (
        {"architectures": None, "model_type": "bert"},
        None,
        ModelError,
        "no image classifier: transformers has none for models of type 'bert'",
    ),
    "an unknown type": ({"architectures": None, "model_type": "no-such-type"}, None, ModelError, "cannot be read as a transformers model"),
    "a missing tensor": ({}, without_a_tensor, ModelError, "lacks 1 of the model's tensors, such as classifier"),
    "another shape": ({}, other_shape, ModelError, "other shapes for"),
    "NaN": ({}, with_nan, ModelError, "NaN or infinite values in"),
    "no processor": ({}, without_processor, ModelError, "no image processor"),
    "quantization": (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        None,
        ModelError,
        "quantized|cannot be read",
    ),
    "half a file": ({}, truncated, ModelError, "cannot be read.*header"),
}


@pytest.mark.parametrize(("change", "damage", "error", "message"), FOLDERS.values(), ids=FOLDERS.keys())
def test_checkpoints_that_cannot_be_used(
    change: dict[str, Any], damage: Any, error: type[PurifyError], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    folder = edited(checkpoint, tmp_path / "model", **change)
    if damage:
        damage(folder)
    with pytest.raises(error, match=message):
        measure(str(folder), GOOD, device="cpu", output=str(tmp_path / "out"))
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


SHELL: dict[str, tuple[list[str], str]] = {
    "unknown method": (["--method", "ntf"], "did you mean 'nft'"),
    "unknown option": (["--option", "stpes=3"], "did you mean 'steps'"),
    "no value": (["--option", "steps"], "expected name=value, got 'steps'"),
    "unknown trigger": (["--trigger", "badnet", "--test", "CLEAN"], "did you mean 'badnets'"),
    "too few samples": (["--samples", "2"], "2 samples are fewer than the 4 classes"),
    "missing data": (["--clean", "./no-such-data"], "cannot read the data set"),
    "unknown flag": (["--methd", "nft"], "No such option"),
    "wrong type": (["--samples", "many"], "as an integer"),
}


@pytest.mark.parametrize(("arguments", "message"), SHELL.values(), ids=SHELL.keys())
def test_the_shell_gets_exit_code_2_and_no_folder(
    arguments: list[str], message: str, checkpoint: Path, stored: Path, tmp_path: Path
) -> None:
    given = [str(stored) if a == "CLEAN" else a for a in arguments]
    done = run("purify", checkpoint, "--clean", stored, "-o", tmp_path / "out", *given)
    assert done.exit_code == 2, done.output
    assert message in " ".join(done.stderr.split())
    assert done.stdout == ""
    assert "Traceback" not in done.output
    assert not list(tmp_path.iterdir())


def test_missing_arguments_are_named() -> None:
    for command, missing in (("purify", "no model given"), ("measure", "no model given"), ("implant", "no model given")):
        done = run(command)
        assert done.exit_code == 2
        assert missing in done.stderr
    assert "no clean data given" in run("purify", "model").stderr
    assert run("list", "metods").exit_code == 2
    assert "did you mean" in run("show", "ntf").stderr


def test_existing_output_needs_overwrite(checkpoint: Path, stored: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    command = ["purify", checkpoint, "--clean", stored, "--option", "steps=2", "--samples", 8, "-o", out]
    done = run(*command)
    assert done.exit_code == 2
    assert "--overwrite" in done.stderr
    assert (out / "mine.txt").read_text() == "mine"
    done = run(*command, "--overwrite")
    assert done.exit_code == 0, done.output
    assert (out / "model.safetensors").is_file()
    assert not (out / "mine.txt").exists()


def test_output_that_cannot_be_written(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write to"):
        purify(str(checkpoint), GOOD, output=str(tmp_path / "file" / "out"))


@pytest.mark.parametrize("overwrite", [False, True])
def test_ctrl_c_ends_with_130_and_no_partial_output(
    overwrite: bool, checkpoint: Path, stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_purify.method import Context
    from hf_purify.methods.nft import NFT

    out = tmp_path / "out"
    if overwrite:
        out.mkdir()
        (out / "old.txt").write_text("old")

    def interrupted(self: NFT, ctx: Context) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(NFT, "purify", interrupted)
    done = run("purify", checkpoint, "--clean", stored, "--samples", 8, "-o", out, *(["--overwrite"] if overwrite else []))
    assert done.exit_code == 130
    assert "interrupted" in done.stderr
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")) == (["out", "out/old.txt"] if overwrite else [])


def test_ctrl_c_while_writing_leaves_nothing(checkpoint: Path, stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_purify.report import Report

    def interrupted(self: Report, folder: Path, *_: object) -> None:
        assert list(Path(folder).glob("*.safetensors")), "the checkpoint is written already"
        raise KeyboardInterrupt

    monkeypatch.setattr(Report, "save", interrupted)
    done = run("purify", checkpoint, "--clean", stored, "--option", "steps=2", "--samples", 8, "-o", tmp_path / "out")
    assert done.exit_code == 130
    assert not list(tmp_path.iterdir())


def test_unknown_augmentation_is_named(checkpoint: Path) -> None:
    with pytest.raises(UnknownName, match=r"augmentation of vision: 'crop-flip'; did you mean 'crop\+flip'"):
        implant(str(checkpoint), GOOD, "badnets", augmentation="crop-flip", device="cpu")


def test_diverging_training_names_the_step_and_has_its_own_exit_code(checkpoint: Path, stored: Path, tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"the loss became \w+ at step \d+; lower the learning rate"):
        implant(str(checkpoint), GOOD, "badnets", lr=1e30, epochs=5, schedule="constant", augmentation="none", device="cpu")
    command = ["implant", checkpoint, "--data", stored, "--trigger", "badnets", "--lr", "1e30", "--epochs", 9, "--batch-size", 2]
    done = run(*command, "-o", tmp_path / "out")
    assert done.exit_code == 4, done.output
    assert "at step" in done.stderr
    assert not list(tmp_path.iterdir())
