"""The demo: a small victim of a modality, made of data that need no download, repaired with every method."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_purify import output
from hf_purify.comparison import open_comparison
from hf_purify.files import free_name
from hf_purify.purifier import run_implant
from hf_purify.recipe import ImplantRecipe, PurifyRecipe
from hf_purify.registry import find, make_method, names
from hf_purify.report import Report
from hf_purify.reporting import report_repair

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
    return compare(recipe, shown.method, shown.options), out / "purified"


def compare(recipe: PurifyRecipe, method: str | None = None, options: Mapping[str, Any] | None = None) -> Report:
    """Repair one model with every method and control, each from the same weights; the repair by `KEPT` is saved.

    Which one is saved is fixed beforehand: taking the best of the table would be a choice made with the trigger known.

    Args:
        method: the only repair beside the controls, and the one that is saved.
        options: its settings.
    """
    kept = method or KEPT
    chosen = [n for n in names("method") if method in (None, n) or find("method", n).control]
    chosen.sort(key=lambda n: (find("method", n).control, n))
    with output.folder(recipe.output, recipe.overwrite) as out:
        comparison = open_comparison(recipe)
        repairs = {name: comparison.repair(make_method(name, **(options or {} if name == kept else {}))) for name in chosen}
        done = repairs[kept]
        comparison.keep(done)
        rows = [comparison.unrepaired, *(r.row for r in repairs.values())]
        what = "A repair and its controls" if method else "Every method"
        title = f"{what} on one backdoored model; the checkpoint beside this page is the repair by {kept}"
        report = report_repair(comparison, done, rows, title)
        if out is not None:
            output.write(out, comparison, done, report)
    return report
