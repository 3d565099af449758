"""The results matrix of text models: victims x methods x seeds, resumable.

    python -m hf_purify_recipes.text.matrix --networks bert_sst2 --triggers badnets,addsent --methods neural_cleanse --seeds 0
    python -m hf_purify_recipes.text.matrix --write          # RESULTS.md from the JSON

A cell that is on disk is not run again. `HF_PURIFY_DATA` names the data; `--folder` keeps victims and cells.
"""

from __future__ import annotations

from pathlib import Path

from hf_purify.recipe import PurifyRecipe

from .. import cells
from ..pages import CLEAN
from . import victims
from .results import PAGE

VARIANTS = {"neural_cleanse-long": {"steps": 140}}  # METHOD-VARIANT: settings that are not the defaults, the same for all victims


def recipe_of(network: str, trigger: str, seed: int, samples: int, folder: Path) -> PurifyRecipe:
    """The repair of one victim; the trigger `none` is the network without a backdoor, measured with its first attack."""
    spec = victims.NETWORKS[network]
    data, known = victims.data_root() / spec.dataset, folder / "victims" / "text"
    base = {"base": str(victims.victim(spec.base, CLEAN, known))} if spec.base else {}
    return PurifyRecipe.make(
        model=str(victims.victim(network, trigger, known)),
        clean=str(data / spec.clean),
        test=str(data / "test.parquet"),
        triggers=[victims.attack(network, trigger)],
        columns=dict(spec.columns),
        samples=samples,
        seed=seed,
        **base,
        **({} if spec.target is None else {"target": spec.target}),
    )


MATRIX = cells.Matrix(
    __doc__,
    recipe_of,
    networks={name: (*spec.triggers, *([] if spec.base else [CLEAN])) for name, spec in victims.NETWORKS.items()},
    samples=200,
    page=PAGE,
    cells="cells-text",
    variants=VARIANTS,
)

if __name__ == "__main__":
    MATRIX.main()
