"""A config that describes more than the file holds, and a file that the memory cannot hold, are refused before anything is made."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import nn
from transformers import AutoModelForImageClassification, ViTConfig, ViTImageProcessor

from hf_purify.errors import ModelError
from hf_purify.room import SPARE, bounded
from hf_purify_adapters.vision.loading import load_folder

SIZES: dict[str, Any] = {
    **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 16, "patch_size": 8},
}


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    AutoModelForImageClassification.from_config(ViTConfig(**SIZES)).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def changed(folder: Path, **change: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    return folder


@pytest.mark.parametrize(
    "change",
    [{"hidden_size": 10**6}, {"intermediate_size": 2**28}, {"image_size": 2**15}, {"num_hidden_layers": 4096}],
    ids=lambda c: next(iter(c)),
)
def test_config_that_describes_more_than_the_file_holds(change: dict[str, int], vit: Path) -> None:
    with pytest.raises(ModelError, match=r"larger model than its weights hold: [\d,]+ values .*, the weights hold [\d,]+ in 40") as caught:
        load_folder(changed(vit, **change), "org/model", None)
    assert "'org/model'" in str(caught.value)


def test_hooks_are_gone_after_good_and_bad_loads(vit: Path) -> None:
    assert load_folder(vit, "m", None).model.config.hidden_size == 16
    with pytest.raises(ModelError):
        load_folder(changed(vit, hidden_size=10**6), "m", None)
    assert nn.Linear(SPARE, 2, device="meta").weight.numel() > SPARE


def test_timm_config_that_describes_more_than_the_file_holds(tmp_path: Path) -> None:
    small: dict[str, Any] = {"layers": (1, 1, 1, 1), "channels": (8, 16, 32, 64), "stem_width": 8}
    model = timm.create_model("resnet18", num_classes=10, **small)
    timm.models.save_for_hf(model, str(tmp_path), model_config={"model_args": small}, safe_serialization=True)
    assert load_folder(tmp_path, "m", None).model.num_classes == 10
    changed(tmp_path, model_args=small | {"channels": (8, 16, 32, 32_000)})
    with pytest.raises(ModelError, match=r"larger model than (its weights hold|the memory holds).*values"):
        load_folder(tmp_path, "m", None)


def test_buffers_are_counted_too(vit: Path) -> None:
    with pytest.raises(ModelError, match="'mask' of Module"), bounded(vit, "m"):
        nn.Module().register_buffer("mask", torch.empty(2**16, 2**16, device="meta"))


def test_tied_and_replaced_tensors_pass(vit: Path) -> None:
    """Loading puts tensors in the place of others; a tied matrix is made for each of its users."""
    with bounded(vit, "m"):
        layer = nn.Linear(SPARE // 4, 3, bias=False, device="meta")
        for _ in range(9):
            layer.weight = nn.Parameter(torch.empty_like(layer.weight))


def test_file_that_does_not_fit_into_the_free_memory(vit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_purify.room.psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(ModelError, match=r"the weights of 'm' take 0\.0 GB, and 0\.0 GB of memory are free"):
        load_folder(vit, "m", None)


def test_each_machine_holds_its_share_of_a_model_that_is_spread(vit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (vit / "model.safetensors").stat().st_size
    monkeypatch.setattr("hf_purify.room.psutil.virtual_memory", lambda: SimpleNamespace(available=size // 2 + 1))
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with bounded(vit, "m", spread=True):
        pass
    with pytest.raises(ModelError, match="memory are free"), bounded(vit, "m"):
        pass
