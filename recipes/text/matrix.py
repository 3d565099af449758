"""The results matrix of text models: victims x methods x seeds, resumable.

    python -m hf_purify_recipes.text.matrix --networks bert_sst2 --triggers badnets,addsent --methods neural_cleanse --seeds 0
    python -m hf_purify_recipes.text.matrix --write          # RESULTS.md from the JSON

A cell that is on disk is not run again. `HF_PURIFY_DATA` names the data; `--folder` keeps victims and cells.
"""

from __future__ import annotations

from pathlib import Path

from hf_purify.recipe import PurifyRecipe

from .. import cells
from . import victims
from .results import RESULTS, write

VARIANTS = {"neural_cleanse-long": {"steps": 140}}  # METHOD-VARIANT: settings that are not the defaults, the same for all victims


def recipe_of(network: str, trigger: str, seed: int, samples: int, folder: Path) -> PurifyRecipe:
    """The repair of one victim; the trigger `none` is the clean network, measured with BadNets."""
    spec = victims.NETWORKS[network]
    data = victims.data_root() / spec.dataset
    return PurifyRecipe.make(
        model=str(victims.victim(network, trigger, folder / "victims" / "text")),
        clean=str(data / spec.clean),
        test=str(data / "test.parquet"),
        triggers=[victims.TRIGGERS["badnets" if trigger == "none" else trigger]],
        target=spec.target,
        samples=samples,
        seed=seed,
    )


MATRIX = cells.Matrix(
    about=__doc__ or "",
    recipe=recipe_of,
    networks=tuple(victims.NETWORKS),
    triggers=tuple(victims.TRIGGERS),
    samples=200,
    results=RESULTS,
    write=write,
    cells="cells-text",
    variants=VARIANTS,
)

if __name__ == "__main__":
    MATRIX.main()
