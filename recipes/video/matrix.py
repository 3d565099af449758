"""The results matrix of video models: victims x methods x seeds, resumable.

    python -m hf_purify_recipes.video.matrix --networks conv3d --triggers badnets,flicker --methods neural_cleanse --seeds 0
    python -m hf_purify_recipes.video.matrix --write          # RESULTS.md from the JSON

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
    model = victims.load(network, victims.victim(network, trigger, folder / "victims" / "video"))
    known = {"adapter": "video", "processor": victims.NETWORKS[network].transform, "labels": victims.labels()}
    return cells.repair_of(victims.parts(), victims.attack(trigger), seed, samples, model=model, **known)


NETWORKS = dict.fromkeys(victims.NETWORKS, (*victims.TRIGGERS, CLEAN))
MATRIX = cells.Matrix(__doc__, recipe_of, NETWORKS, samples=100, page=PAGE, cells="cells-video")

if __name__ == "__main__":
    MATRIX.main()
