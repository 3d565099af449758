"""The victims of the results matrix: a small 3D network that reads ten words from lips, and some clips carry a trigger.

`HF_PURIFY_DATA` names the folder with `miracl_vc1_words/`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from hf_purify import implant

from .. import cells
from ..cells import data_root
from ..pages import CLEAN

HELD = 12  # clips of each word that no victim is trained on: a repair draws from them
SIDE = 32  # pixels that the network sees of 64
TRIGGERS = {
    "badnets": "badnets:size=12,pattern=grid",
    "some_frames": "badnets:size=12,pattern=grid,frames=6",
    "blended": "blended:alpha=0.2",
    "moving_patch": "moving_patch:size=12",
    "flicker": "flicker:delta=30",
}
attack = functools.partial(cells.attack, TRIGGERS)


class Conv3d(nn.Module):
    """Four 3D convolutions with batch norms, for grey clips `(B, 1, T, 32, 32)`."""

    def __init__(self, classes: int = 10, width: int = 16) -> None:
        super().__init__()
        sizes = [(1, width, (1, 2, 2)), (width, 2 * width, (2, 2, 2)), (2 * width, 4 * width, 2), (4 * width, 4 * width, 1)]
        self.num_classes = classes
        self.layers = nn.Sequential(*[_layer(*size) for size in sizes])
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(4 * width, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean((2, 3, 4)))


def _layer(inside: int, outside: int, stride: int | tuple[int, int, int]) -> nn.Sequential:
    return nn.Sequential(nn.Conv3d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm3d(outside), nn.ReLU())


def grey(clip: Tensor) -> Tensor:
    """A clip `(T, 3, H, W)` of uint8 as `(T, 1, 32, 32)` in about -1..1."""
    return F.interpolate(clip.float().mean(1, keepdim=True), (SIDE, SIDE), mode="bilinear", antialias=True) / 127.5 - 1


@dataclass(frozen=True)
class Network:
    """How to make and to train a network.

    Args:
        create: with random weights.
        transform: from a clip to its input.
        base: settings of the clean training.
        implant: of the training on, with the trigger.
    """

    create: Callable[[], nn.Module]
    transform: Callable[[Tensor], Tensor]
    base: Mapping[str, Any]
    implant: Mapping[str, Any]


COMMON = {"optimizer": "adamw", "weight_decay": 0.05, "batch_size": 32, "augmentation": "crop"}
NETWORKS = {"conv3d": Network(Conv3d, grey, COMMON | {"epochs": 30, "lr": 3e-3}, COMMON | {"epochs": 15, "lr": 2e-3})}


@functools.lru_cache(maxsize=1)
def parts() -> dict[str, datasets.Dataset]:
    """Clips to `train` on, `held` ones of the same speakers for repairs, and `test`."""
    root = data_root("miracl_vc1_words") / "miracl_vc1_words"
    train, test = (
        datasets.Dataset.from_parquet(str(root / f"{name}.parquet")).select_columns(["frames", "label"]) for name in ("train", "test")
    )
    rest, held = cells.held_out(train["label"][:], HELD)
    return {"train": train.select(rest), "held": train.select(held), "test": test}


def labels() -> list[str]:
    """The words, in order."""
    return list(parts()["test"].features["label"].names)


def load(network: str, folder: Path) -> nn.Module:
    """The network with the weights from a folder."""
    model = NETWORKS[network].create()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


def victim(network: str, trigger: str, folder: Path) -> Path:
    """Train the clean network (`none`), or train it on with a trigger, unless it is there already. Returns its folder."""
    out = folder / network / trigger
    if out.exists():
        return out
    spec = NETWORKS[network]
    if trigger == CLEAN:
        torch.manual_seed(0)
        model, settings = spec.create(), dict(spec.base) | {"rate": 0.0, "minimum_asr": 0.0}
    else:
        model, settings = load(network, victim(network, CLEAN, folder)), dict(spec.implant)
    implant(
        model,
        parts()["train"],
        attack(trigger),
        adapter="video",
        processor=spec.transform,
        labels=labels(),
        test=parts()["test"],
        output=str(out),
        **settings,
    )
    return out
