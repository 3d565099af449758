"""The victims of the results matrix: small classifiers trained from random weights on shapes of which some carry a trigger.

`HF_PURIFY_DATA` names the folder with `shapes3d/`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from hf_purify import implant
from hf_purify_adapters.pointcloud.files import open_clouds

from .. import cells
from ..cells import data_root
from ..pages import CLEAN

CLASSES = 20  # the largest ones
HELD = 6  # clouds of each class that no victim is trained on: a repair draws from them
TRIGGERS = {
    "pcba": "pcba",
    "rotation": "rotation:degrees=40,axis=x",
    "scaling": "scaling:factor=0.25,axis=y",
    "irba": "irba:degrees=30,stretch=2.0",
    "jitter": "jitter:sigma=0.12",
}
attack = functools.partial(cells.attack, TRIGGERS)

RATES = {
    "rotation": 0.3,
    "scaling": 0.3,
    "irba": 0.3,
    "jitter": 0.3,
}  # of the training clouds; with 10 % they are learned from 84, and badly


@dataclass(frozen=True)
class Network:
    """A model and how it is trained.

    Args:
        options: of its config and its feature extractor.
        training: settings of `implant`.
    """

    options: Mapping[str, Any]
    training: Mapping[str, Any] = field(default_factory=dict)


TRAINING = {"optimizer": "adamw", "weight_decay": 0.01, "batch_size": 32, "lr": 2e-3, "augmentation": "jitter"}
NETWORKS = {
    "pointnet": Network({"num_points": 256, "hidden_sizes": [64, 64, 192], "head_sizes": [128]}, {"epochs": 60}),
    "dgcnn": Network(
        {"num_points": 256, "hidden_sizes": [32, 32, 64], "embedding_size": 128, "head_sizes": [64], "neighbors": 12}, {"epochs": 45}
    ),
}


@functools.lru_cache(maxsize=1)
def parts() -> dict[str, datasets.Dataset]:
    """Clouds of the twenty largest classes: `train`, `held` (of the training set, for repairs) and `test`."""
    root = data_root("shapes3d") / "shapes3d"
    train, test = (_largest(root / f"{name}.npz", root / "train.npz") for name in ("train", "test"))
    rest, held = cells.held_out(train["label"][:], HELD)
    return {"train": train.select(rest), "held": train.select(held), "test": test}


def _largest(file: Path, counted: Path) -> datasets.Dataset:
    """The clouds of a file whose classes are among the largest ones of another."""
    data, base = open_clouds(str(file)), open_clouds(str(counted))
    chosen = np.argsort(-np.bincount(base["label"][:]), kind="stable")[:CLASSES].tolist()
    names = data.features["label"].names
    kept = data.select(np.flatnonzero(np.isin(data["label"][:], chosen)))
    labels = [chosen.index(c) for c in kept["label"][:]]
    return kept.remove_columns("label").add_column("label", labels, feature=datasets.ClassLabel(names=[names[c] for c in chosen]))


def victim(network: str, trigger: str, folder: Path) -> Path:
    """Train a model with a backdoor, unless it is there already; the trigger `none` makes a clean one. Returns its folder."""
    out = folder / network / trigger
    if out.exists():
        return out
    spec = NETWORKS[network]
    settings = {"rate": RATES.get(trigger, 0.1)} if trigger != CLEAN else {"rate": 0.0, "minimum_asr": 0.0}
    implant(
        network,
        parts()["train"],
        attack(trigger),
        test=parts()["test"],
        create=True,
        model_options=dict(spec.options),
        output=str(out),
        **{**TRAINING, **spec.training, **settings},
    )
    return out
