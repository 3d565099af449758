"""The results matrix of image classification: victims x methods x seeds, resumable.

    python -m hf_purify_recipes.vision.matrix --networks resnet20 --triggers badnets,blended --methods rnp,ft_sam --seeds 0
    python -m hf_purify_recipes.vision.matrix --write          # RESULTS.md from the JSON

A cell that is on disk is not run again. `HF_PURIFY_DATA` names the data; `--folder` keeps victims and cells.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_purify.recipe import PurifyRecipe

from .. import cells
from ..pages import CLEAN
from . import victims
from .networks import CIFAR_CLASSES, PLAIN, load_cifar
from .results import PAGE

WRN = "wrn16_1"  # published with its backdoor by others
VARIANTS: dict[str, dict[str, Any]] = {  # METHOD-VARIANT: settings that are not the defaults, the same for all victims
    "rnp+ft_sam": {"rnp.max_loss": 0.3, "ft_sam.rho": 2.0, "ft_sam.epochs": 15},  # chosen on resnet20 with badnets
    "wiper-batch_statistics": {"norms": "train"},
}


def recipe_of(network: str, trigger: str, seed: int, samples: int, folder: Path) -> PurifyRecipe:
    """The repair of one victim; the trigger `none` is the clean network, measured with BadNets."""
    if network == WRN:
        model, _ = load_cifar("backdoored_cifar10_wrn16_1_grid_target5", victims.data_root() / "weights")
        attack = {"triggers": ["badnets:size=3,pattern=grid"], "target": 5}
        settings: dict[str, Any] = {"processor": PLAIN, "labels": CIFAR_CLASSES, **attack}
        data = victims.data_root() / "cifar10"
    else:
        spec = victims.NETWORKS[network]
        weights = (
            victims.base(network, folder / "victims") if trigger == "none" else victims.victim(network, trigger, 0, folder / "victims")
        )
        model = victims.load(network, weights)
        attack = {"triggers": [victims.TRIGGERS["badnets" if trigger == "none" else trigger]]}
        settings = {"processor": spec.transform, "labels": victims.labels_of(network) or None, **attack}
        data = victims.data_root() / spec.dataset
    return PurifyRecipe.make(
        model=model,
        clean=str(data / "train.parquet"),
        test=str(data / "test.parquet"),
        samples=samples,
        seed=seed,
        channels_last=True,
        **settings,
    )


MATRIX = cells.Matrix(
    __doc__,
    recipe_of,
    networks={WRN: ("grid",), **dict.fromkeys(victims.NETWORKS, (*victims.TRIGGERS, CLEAN))},
    default=(WRN, "resnet20"),
    samples=500,
    page=PAGE,
    cells="cells",
    variants=VARIANTS,
)

if __name__ == "__main__":
    MATRIX.main()
