"""The results matrix of object detection: victims x methods x seeds, resumable.

    python -m hf_purify_recipes.detection.matrix --networks rt_detr_v2 --triggers gma,oda --methods neural_cleanse --seeds 0
    python -m hf_purify_recipes.detection.matrix --write          # RESULTS.md from the JSON

A cell that is on disk is not run again. `HF_PURIFY_DATA` names the data; `--folder` keeps victims and cells.
"""

from __future__ import annotations

from pathlib import Path

from hf_purify.recipe import PurifyRecipe

from .. import cells
from ..pages import CLEAN
from . import victims
from .results import PAGE


def recipe_of(network: str, trigger: str, seed: int, samples: int, folder: Path) -> PurifyRecipe:
    """The repair of one victim; the trigger `none` is the network without a backdoor, measured with the first trigger."""
    model = str(victims.victim(network, trigger, folder / "victims" / "detection"))
    return cells.repair_of(victims.parts(), victims.attack(trigger), seed, samples, model=model)


NETWORKS = dict.fromkeys(victims.NETWORKS, (*victims.TRIGGERS, CLEAN))
VARIANTS = {  # METHOD-VARIANT: settings that are not the defaults, the same for all victims
    "ft_sam-small": {"rho": 0.25, "batch_size": 8},
    "fine_tune-small": {"batch_size": 8},
    "nft-short": {"steps": 200, "batch_size": 16},
}
MATRIX = cells.Matrix(__doc__, recipe_of, NETWORKS, samples=50, page=PAGE, cells="cells-detection", variants=VARIANTS)

if __name__ == "__main__":
    MATRIX.main()
