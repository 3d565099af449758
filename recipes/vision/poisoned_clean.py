"""What happens to a scan and to a repair when some of the clean samples carry the trigger themselves.

    python -m hf_purify_recipes.vision.poisoned_clean --folder runs

Victims of the population with a patch or a blended picture; of 500 images 0, 1 and 2 % carry the trigger and the attacker's label, as in poisoned training data. Results go to
`poisoned_clean.json` beside this file. `HF_PURIFY_DATA` names the data.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from tqdm.auto import tqdm

from hf_purify import purify
from hf_purify.files import replace_text
from hf_purify.recipe import ScanRecipe
from hf_purify.scanner import run_scan

from . import population, victims

REPAIRED = ("wrn16_1-badnets-t9-s7", "wrn16_1-blended-t4-s7")
SCANNED = (
    *REPAIRED,
    "resnet20-badnets-t8-s7",
    "resnet20-blended-t1-s0",
    "timm_resnet-badnets-t1-s7",
    "timm_resnet-blended-t2-s7",
)
RATES = (0.0, 0.01, 0.02)
SAMPLES = 500
METHODS = ("neural_cleanse", "fine_tune")
OUTPUT = Path(__file__).with_suffix(".json")


def clean_set(member: population.Member, rate: float) -> datasets.Dataset:
    """As many images of each class, in a seeded order, of which a share carries the trigger and the target's label."""
    data = datasets.Dataset.from_parquet(member.split("train"))
    order, labels = np.random.default_rng(0).permutation(len(data)), np.asarray(data["label"])
    rows = np.concatenate([order[labels[order] == c][: SAMPLES // len(victims.CIFAR_CLASSES)] for c in range(len(victims.CIFAR_CLASSES))])
    others = [i for i, row in enumerate(rows) if labels[row] != member.target]
    chosen = np.random.default_rng(1).choice(others, round(rate * SAMPLES), replace=False)
    return population.planted(data.select(rows), chosen, member.triggers[0], member.target)


def scanned(member: population.Member, rate: float, folder: Path) -> dict[str, Any]:
    """What a scan of a victim says with such a clean set."""
    model, transform = population.network(member, folder)
    common: dict[str, Any] = {"processor": transform, "labels": member.labels, "samples": None, "channels_last": True}
    found = run_scan(ScanRecipe.make(model=model, clean=clean_set(member, rate), **common))
    cell: dict[str, Any] = {
        "victim": member.name,
        "target": member.target,
        "rate": rate,
        "poisoned": round(rate * SAMPLES),
        "samples": SAMPLES,
    }
    return cell | {"score": found.score, "targets": found.targets, "warned": [w for w in found.warnings if "look as if" in w]}


def repaired(member: population.Member, rate: float, folder: Path) -> dict[str, Any]:
    """What repairs of a victim leave with such a clean set."""
    test = {"test": member.split("test"), "triggers": list(member.triggers), "target": member.target}
    cell = {}
    for method in METHODS:
        model, transform = population.network(member, folder)
        common: dict[str, Any] = {"processor": transform, "labels": member.labels, "samples": None, "channels_last": True}
        report = purify(model, clean_set(member, rate), method=method, controls=False, **common, **test)
        before, after = report.rows[0], report.rows[1]
        cell[method] = {"before": row_of(before), "after": row_of(after)}
    return cell


def row_of(row: Any) -> dict[str, str]:
    return {"ACC": str(row.clean_accuracy), "ASR": str(next(iter(row.asr.values())))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs"))
    chosen = parser.parse_args()
    cells = json.loads(OUTPUT.read_text("utf-8")) if OUTPUT.exists() else []
    known = {(c["victim"], c["rate"]) for c in cells}
    members = [m for m in population.members() if m.name in SCANNED]
    for member, rate in tqdm([(m, r) for m in members for r in RATES], desc="poisoned clean sets"):
        if (member.name, rate) not in known:
            cell = scanned(member, rate, chosen.folder)
            cells.append(cell | repaired(member, rate, chosen.folder) if member.name in REPAIRED else cell)
            replace_text(OUTPUT, json.dumps(cells, indent=1) + "\n")


if __name__ == "__main__":
    main()
