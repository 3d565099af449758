"""The results matrix of text models: victims x methods x seeds, resumable.

    python -m hf_purify_recipes.text.matrix --networks bert_sst2 --triggers badnets,addsent --methods neural_cleanse --seeds 0
    python -m hf_purify_recipes.text.matrix --write          # RESULTS.md from the JSON

A cell that is on disk is not run again. `HF_PURIFY_DATA` names the data; `--folder` keeps victims and cells.
"""

from __future__ import annotations

import argparse
import logging
from functools import partial
from pathlib import Path

from hf_purify.errors import NotAVictim
from hf_purify.recipe import PurifyRecipe
from hf_purify.registry import find, names

from .. import cells
from . import victims
from .results import RESULTS, write

VARIANTS = {"neural_cleanse-long": {"steps": 140}}  # METHOD-VARIANT: settings that are not the defaults, the same for all victims
log = logging.getLogger(__name__)


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


def main() -> None:
    """Command line of the matrix."""
    everything = sorted(names("method"), key=lambda n: (not find("method", n).control, n))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(victims.NETWORKS))
    parser.add_argument("--triggers", default=",".join([*victims.TRIGGERS, "none"]))
    parser.add_argument("--methods", default=",".join([*everything, *VARIANTS]))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--folder", type=Path, default=Path("runs"))
    parser.add_argument("--write", action="store_true", help="only collect the cells and write RESULTS.md")
    chosen = parser.parse_args()
    if not chosen.write:
        for seed in (int(s) for s in chosen.seeds.split(",")):
            for network in chosen.networks.split(","):
                for trigger in chosen.triggers.split(","):
                    common = {"network": network, "trigger": trigger, "seed": seed, "samples": chosen.samples}
                    recipe = partial(recipe_of, network, trigger, seed, chosen.samples, chosen.folder)
                    try:
                        cells.run(recipe, chosen.folder / "cells-text" / network / trigger, common, chosen.methods.split(","), VARIANTS)
                    except NotAVictim as error:
                        log.warning("%s with %s: %s", network, trigger, error)
    cells.collect(chosen.folder / "cells-text", RESULTS)
    write()


if __name__ == "__main__":
    main()
