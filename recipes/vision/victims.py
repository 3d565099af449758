"""The victims of the results matrix: networks with a known backdoor, made once and kept by content.

`HF_PURIFY_DATA` names the folder with `cifar10/`, `gtsrb/` and `weights/`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import nn
from torchvision import transforms

from hf_purify import implant

from ..cells import data_root as root
from .networks import CIFAR_CLASSES, NORMALIZED, load_cifar

data_root = partial(root, "cifar10", "gtsrb", "weights")
TRIGGERS = {
    "badnets": "badnets:size=3,pattern=grid",
    "blended": "blended",
    "sig": "sig",
    "trojan": "trojan",
    "wanet": "wanet:strength=3.0",
    "low_frequency": "low_frequency:amplitude=20",
    "bpp": "bpp:bits=2,dither=false",
}


@dataclass(frozen=True)
class Network:
    """How to make and to train one architecture.

    Args:
        create: a new network, or one with published weights.
        transform: from PIL image to input.
        dataset: folder under `HF_PURIFY_DATA`.
        base: settings of the clean training from random weights; empty where the weights are published.
        implant: settings of the fine-tuning that plants a backdoor.
    """

    create: Callable[[], nn.Module]
    transform: transforms.Compose
    dataset: str
    base: dict[str, Any]
    implant: dict[str, Any]


def _vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=96, depth=6, num_heads=3, num_classes=10, drop_path_rate=0.05
    )


def _convnext() -> nn.Module:
    return timm.create_model(
        "convnext_atto", patch_size=2, depths=(2, 2, 4, 2), dims=(40, 80, 160, 240), num_classes=10, drop_path_rate=0.05
    )


_FINE_TUNE = {"epochs": 3, "lr": 0.03, "batch_size": 128, "augmentation": "none"}
_SCRATCH_LN = {"optimizer": "adamw", "lr": 2e-3, "weight_decay": 0.05, "batch_size": 128}

NETWORKS = {
    "resnet20": Network(lambda: load_cifar("cifar10_resnet20", data_root() / "weights")[0], NORMALIZED, "cifar10", {}, _FINE_TUNE),
    "resnet56": Network(lambda: load_cifar("cifar10_resnet56", data_root() / "weights")[0], NORMALIZED, "cifar10", {}, _FINE_TUNE),
    "timm_resnet": Network(
        lambda: timm.create_model("resnet10t", num_classes=10),
        NORMALIZED,
        "cifar10",
        {"epochs": 10, "lr": 0.1, "batch_size": 128},
        _FINE_TUNE,
    ),
    "convnext": Network(
        _convnext, NORMALIZED, "cifar10", _SCRATCH_LN | {"epochs": 24}, _SCRATCH_LN | {"epochs": 5, "lr": 1e-3, "augmentation": "none"}
    ),
    "vit": Network(
        _vit,
        NORMALIZED,
        "cifar10",
        _SCRATCH_LN | {"epochs": 12, "lr": 1.5e-3},
        _SCRATCH_LN | {"epochs": 4, "lr": 7e-4, "augmentation": "none"},
    ),
    "gtsrb_resnet": Network(
        lambda: timm.create_model("resnet10t", num_classes=43),
        NORMALIZED,
        "gtsrb",
        {"epochs": 20, "lr": 0.1, "batch_size": 128, "augmentation": "crop"},
        _FINE_TUNE | {"epochs": 4},
    ),
}


def labels_of(network: str) -> list[str]:
    """Class names of the network's data set."""
    return CIFAR_CLASSES if NETWORKS[network].dataset == "cifar10" else []


def base(network: str, folder: Path) -> Path | None:
    """Train the clean network, unless its weights are published or already there; returns its folder."""
    spec = NETWORKS[network]
    if not spec.base:
        return None
    out = folder / network / "clean"
    if not out.exists():
        torch.manual_seed(0)
        _train(spec, spec.create(), out, "badnets", {**spec.base, "rate": 0.0}, seed=0)
    return out


def load(network: str, folder: Path | None) -> nn.Module:
    """The network with the weights from a folder, or with its published ones."""
    model = NETWORKS[network].create()
    if folder is not None:
        model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


def victim(network: str, trigger: str, seed: int, folder: Path, rule: str = "all-to-one") -> Path:
    """Plant a backdoor, unless the victim is there already; returns its folder."""
    out = folder / network / (trigger if rule == "all-to-one" else f"{trigger}-{rule}") / f"seed{seed}"
    if not out.exists():
        spec = NETWORKS[network]
        _train(spec, load(network, base(network, folder)), out, TRIGGERS[trigger], {**spec.implant, "rule": rule}, seed)
    return out


def _train(spec: Network, model: nn.Module, out: Path, trigger: str, settings: dict[str, Any], seed: int) -> None:
    root = data_root() / spec.dataset
    implant(
        model,
        str(root / "train.parquet"),
        trigger,
        test=str(root / "test.parquet"),
        processor=spec.transform,
        output=str(out),
        seed=seed,
        precision="bf16",
        channels_last=True,
        **settings,
    )
