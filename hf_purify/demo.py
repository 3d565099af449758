"""The demo: a small victim of a modality, made of data that need no download, repaired with every method."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_purify import output
from hf_purify.comparison import open_comparison
from hf_purify.provenance import report_repair
from hf_purify.purifier import run_implant
from hf_purify.recipe import ImplantRecipe, PurifyRecipe
from hf_purify.registry import find, make_method, names
from hf_purify.report import Report

TARGET = 0
KEPT = "ft_sam"


def run_demo(folder: str = "hf-purify-demo", seed: int = 0, modality: str = "vision") -> tuple[Report, Path]:
    """Implant, repair with every method and control, report; returns the report and the folder that holds everything.

    An existing folder of that name is left alone: the next free name is taken.

    Raises:
        ConfigError: the modality has no demo.
    """
    out = free_name(Path(folder))
    shown = find("adapter", modality)().demo()
    common = {"triggers": [shown.trigger], "target": TARGET, "test": shown.test, "seed": seed, "adapter": modality}
    run_implant(ImplantRecipe.make(data=shown.train, output=str(out / "victim"), **common, **shown.settings))
    recipe = PurifyRecipe.make(model=str(out / "victim"), clean=shown.train, samples=shown.samples, output=str(out / "purified"), **common)
    return compare(recipe, shown.options, shown.brief), out / "purified"


def free_name(folder: Path) -> Path:
    """`folder`, or `folder-2`, `folder-3`, ... where it exists."""
    found, k = folder, 1
    while found.exists():
        k += 1
        found = folder.with_name(f"{folder.name}-{k}")
    return found


def compare(recipe: PurifyRecipe, options: Mapping[str, Any] | None = None, brief: bool = False) -> Report:
    """Repair one model with every method and control, each from the same weights; the repair by `KEPT` is saved.

    Which one is saved is fixed beforehand: taking the best of the table would be a choice made with the trigger known.

    Args:
        options: settings of that one.
        brief: run that one and the controls alone.
    """
    chosen = [n for n in names("method") if not brief or n == KEPT or find("method", n).control]
    with output.folder(recipe.output, recipe.overwrite) as out:
        comparison = open_comparison(recipe)
        ordered = sorted(chosen, key=lambda n: (find("method", n).control, n))
        repairs = {name: comparison.repair(make_method(name, **(options or {} if name == KEPT else {}))) for name in ordered}
        done = repairs[KEPT]
        comparison.keep(done)
        rows = [comparison.unrepaired, *(r.row for r in repairs.values())]
        title = f"{'A repair and its controls' if brief else 'Every method'} on one backdoored model; the checkpoint beside this page is the repair by {KEPT}"
        report = report_repair(comparison, done, rows, title)
        if out is not None:
            output.write(out, comparison, done, report)
    return report
