"""The results matrix of image classification: victims x methods x seeds, resumable.

    python -m hf_purify_recipes.vision.matrix --networks resnet20 --triggers badnets,blended --methods rnp,ft_sam --seeds 0
    python -m hf_purify_recipes.vision.matrix --write          # RESULTS.md from the JSON

A cell that is on disk is not run again. `HF_PURIFY_DATA` names the data; `--folder` keeps victims and cells.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from pathlib import Path
from typing import Any

from hf_purify.comparison import open_comparison
from hf_purify.errors import NotAVictim
from hf_purify.recipe import PurifyRecipe
from hf_purify.registry import find, make_method, names
from hf_purify.report import Row

from . import victims
from .networks import CIFAR_CLASSES, PLAIN, load_cifar
from .results import RESULTS, write

log = logging.getLogger(__name__)
WRN = "wrn16_1"  # published with its backdoor by others
VARIANTS: dict[str, dict[str, Any]] = {  # METHOD-VARIANT: settings that are not the defaults, the same for all victims
    "rnp+ft_sam": {"rnp.max_loss": 0.3, "ft_sam.rho": 2.0, "ft_sam.epochs": 15},  # chosen on resnet20 with badnets
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


def run(network: str, trigger: str, methods: list[str], seed: int, samples: int, folder: Path) -> None:
    """Run the missing cells of one victim, all from the same weights."""
    place = folder / "cells" / network / trigger
    missing = [m for m in methods if not cell(place, m, seed, samples).exists()]
    if not missing:
        return
    comparison = open_comparison(recipe_of(network, trigger, seed, samples, folder))
    common = {"network": network, "trigger": trigger, "seed": seed, "samples": samples}
    save(cell(place, "none", seed, samples), common | row_of(comparison.unrepaired))
    for name in missing:
        done = comparison.repair(make_method(name.partition("-")[0], **VARIANTS.get(name, {})))
        save(cell(place, name, seed, samples), common | row_of(done.row) | {"method": name})


def row_of(row: Row) -> dict[str, Any]:
    """One row of a report's table as plain values."""
    trigger = next(iter(row.asr))
    return {
        "method": row.name,
        "kind": row.kind,
        "clean_accuracy": row.clean_accuracy.to_dict() if row.clean_accuracy else None,
        "asr": row.asr[trigger].to_dict(),
        "robust_accuracy": row.robust_accuracy[trigger].to_dict(),
        "der": row.der.get(trigger),
        "seconds": row.seconds,
        "notes": {k: v for k, v in row.notes.items() if isinstance(v, (int, float, str, bool))},
    }


def cell(place: Path, method: str, seed: int, samples: int) -> Path:
    return place / f"{method}-n{samples}-s{seed}.json"


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a cell under another name and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_suffix(".tmp")
    work.write_text(json.dumps(content, indent=1), "utf-8")
    os.replace(work, path)


def collect(folder: Path) -> None:
    """Join all cells on disk with those in `results.json` already; a cell that was run again wins."""
    known = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else []
    cells = {tuple(c[k] for k in ("network", "trigger", "method", "seed", "samples")): c for c in known}
    for path in sorted((folder / "cells").rglob("*.json")):
        c = json.loads(path.read_text("utf-8"))
        cells[tuple(c[k] for k in ("network", "trigger", "method", "seed", "samples"))] = c
    RESULTS.write_text(json.dumps([cells[k] for k in sorted(cells)], indent=0) + "\n", "utf-8")


def main() -> None:
    """Command line of the matrix."""
    everything = sorted(names("method"), key=lambda n: (not find("method", n).control, n == "nft", n))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=f"{WRN},resnet20")
    parser.add_argument("--triggers", default=",".join([*victims.TRIGGERS, "none"]))
    parser.add_argument("--methods", default=",".join([*everything, *VARIANTS]))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--folder", type=Path, default=Path("runs"))
    parser.add_argument("--write", action="store_true", help="only collect the cells and write RESULTS.md")
    chosen = parser.parse_args()
    if not chosen.write:
        for seed in (int(s) for s in chosen.seeds.split(",")):
            for network in chosen.networks.split(","):
                for trigger in ["grid"] if network == WRN else chosen.triggers.split(","):
                    try:
                        run(network, trigger, chosen.methods.split(","), seed, chosen.samples, chosen.folder)
                    except NotAVictim as error:
                        log.warning("%s with %s: %s", network, trigger, error)
    collect(chosen.folder)
    write()


if __name__ == "__main__":
    main()
