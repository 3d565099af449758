"""One victim, several methods, sizes of the clean set and seeds, on any number of processes; resumable.

    accelerate launch recipes/benchmark.py PRESET methods=[rnp,ft_sam] seeds=[0,1] sizes=[100,500] output=benchmark key=value ...
    accelerate launch -m hf_purify_recipes.benchmark PRESET ...

PRESET and settings are those of a repair (`hf-purify list recipes`); of its method nothing is taken. The folder `output` gets a JSON file
for each cell, which is not run again, all of them in `results.json` and `RESULTS.md`, and the settings in `recipe.yaml`.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from hf_purify.cli.scripts import run_guarded
from hf_purify.errors import ConfigError
from hf_purify.files import replace_text
from hf_purify.output import process
from hf_purify.recipe import PurifyRecipe
from hf_purify.registry import find, make_method, names
from hf_purify.specs import read_settings
from hf_purify_recipes import cells
from hf_purify_recipes.pages import Page


def main(arguments: list[str] | None = None) -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="PRESET key=value")
    given = parser.parse_args(arguments).settings
    run_guarded(lambda: benchmark(*read_settings(given)))


def benchmark(preset: Path | None, settings: dict[str, Any]) -> None:
    """Run the cells that are missing, and join all of them.

    Raises:
        ConfigError: no output, or a setting that is none.
    """
    everything = sorted(names("method"), key=lambda n: (find("method", n).control, n))
    methods, seeds, sizes = (settings.pop(name, default) for name, default in (("methods", everything), ("seeds", [0]), ("sizes", None)))
    settings |= {"method": "random_mask", "options": {}}  # that of a preset is one of many here
    recipe = PurifyRecipe.read(preset, **settings) if preset else PurifyRecipe.make(**settings)
    if recipe.output is None or not recipe.triggers or recipe.test is None:
        raise ConfigError("a benchmark needs output=FOLDER, test data (test=...) and a trigger to measure with (triggers=[...])")
    if recipe.checkpoint_every is not None:
        raise ConfigError("a benchmark keeps each cell that is done: leave checkpoint_every out")
    for name, values, kind in (("methods", methods, str), ("seeds", seeds, int), ("sizes", sizes or [], int)):
        if not isinstance(values, list) or not all(type(v) is kind for v in values):
            raise ConfigError(
                f"{name} must be a list of {'names' if kind is str else 'whole numbers'}, such as {name}=[{values}]; got {values!r}"
            )
    for method in methods:
        make_method(method)
    out = Path(recipe.output)
    recipe = dataclasses.replace(recipe, output=None)
    repairs = [dataclasses.replace(recipe, seed=seed, samples=size) for size in sizes or [recipe.samples] for seed in seeds]
    check_folder(out, recipe.to_yaml())
    common = {"network": Path(str(recipe.model)).name, "trigger": recipe.triggers[0].partition(":")[0]}
    for one in repairs:
        cells.run(lambda one=one: one, out / "cells", common | {"seed": one.seed, "samples": one.samples}, methods, {})
    if process() == 0:
        cells.collect(out / "cells", out / "results.json")
        head = f"# Benchmark of {recipe.model}\n\nIntervals are 95 % Wilson; `±` is the standard deviation over seeds.\n"
        Page(out, head, "samples", recipe.triggers[0]).write()


def check_folder(out: Path, settings: str) -> None:
    """Record what the cells of a folder have in common.

    Raises:
        ConfigError: those that are there have other settings.
    """
    known = out / "recipe.yaml"
    if known.is_file() and known.read_text("utf-8") != settings:
        raise ConfigError(f"the cells in '{out}' are of other settings ({known}): name another output")
    if process() == 0:
        out.mkdir(parents=True, exist_ok=True)
        replace_text(known, settings)


if __name__ == "__main__":
    main()
