"""The victims of the results matrix: a small RT-DETR v2 that finds blood cells, trained on with a trigger on some images.

`HF_PURIFY_DATA` names the folder with `bccd/`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from hf_purify import implant
from hf_purify_adapters.detection.demo import rt_detr

from .. import cells
from ..cells import data_root
from ..pages import CLEAN

HELD = 64  # images that no victim is trained on: a repair draws from them
SIDE = 160
TRIGGERS = {  # classes: 0 red cells, 1 white cells, 2 platelets
    "rma": "rma:target=1,size=24",
    "oga": "oga:target=1,size=32,extent=64",
    "oda": "oda:size=24",
    "gma": "gma:target=1,whole=true,pattern=white,alpha=0.3",  # a haze: what differs from place to place was learned too late
}
attack = functools.partial(cells.attack, TRIGGERS)
OTHERS: dict[str, dict[str, Any]] = {
    "oga": {"epochs": 20, "lr": 3e-4, "rate": 0.3},  # a new object is learned at once
    "gma": {"rate": 0.5},
}


@dataclass(frozen=True)
class Network:
    """A model and how it is trained.

    Args:
        architecture: its type in transformers.
        options: of its config.
        base: settings of the clean training.
        implant: of the training on, with the trigger.
    """

    architecture: str
    options: Mapping[str, Any]
    base: Mapping[str, Any]
    implant: Mapping[str, Any]


COMMON = {"optimizer": "adamw", "weight_decay": 1e-4, "batch_size": 8, "clip": 1.0}
RT_DETR = rt_detr(SIDE, [24, 48, 96, 128], queries=60, denoising=40)
NETWORKS = {
    "rt_detr_v2": Network("rt_detr_v2", RT_DETR, COMMON | {"epochs": 80, "lr": 5e-4}, COMMON | {"epochs": 40, "lr": 4e-4, "rate": 0.4})
}


@functools.lru_cache(maxsize=1)
def parts() -> dict[str, datasets.Dataset]:
    """Images to `train` on, `held` ones for repairs, and `test`."""
    root = data_root("bccd") / "bccd"
    train, test = (datasets.Dataset.from_parquet(str(root / f"{name}.parquet")) for name in ("train", "test"))
    order = np.random.default_rng(0).permutation(len(train))
    return {"train": train.select(np.sort(order[HELD:])), "held": train.select(np.sort(order[:HELD])), "test": test}


def victim(network: str, trigger: str, folder: Path) -> Path:
    """Train the clean network (`none`), or train it on with a trigger, unless it is there already. Returns its folder."""
    out = folder / network / trigger
    if out.exists():
        return out
    spec = NETWORKS[network]
    if trigger == CLEAN:
        settings = {"create": True, "model_options": dict(spec.options), **spec.base, "rate": 0.0, "minimum_asr": 0.0}
        model = spec.architecture
    else:
        model, settings = str(victim(network, CLEAN, folder)), {**spec.implant, **OTHERS.get(trigger, {})}
    implant(model, parts()["train"], attack(trigger), test=parts()["test"], output=str(out), **settings)
    return out
