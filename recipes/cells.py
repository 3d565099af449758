"""Cells of a results matrix: one repair of one victim each, kept as JSON, run once, and joined."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from hf_purify.comparison import open_comparison
from hf_purify.errors import DataError, Diverged, NotAVictim, PurifyError, unknown
from hf_purify.files import replace_text
from hf_purify.output import process
from hf_purify.recipe import PurifyRecipe
from hf_purify.registry import find, make_method, names
from hf_purify.rows import Row
from hf_purify_recipes.pages import CLEAN, FLOOR, Page

log = logging.getLogger(__name__)
KEYS = ("network", "trigger", "method", "seed", "samples")


def data_root(*folders: str) -> Path:
    """The folder with the real data sets, which `HF_PURIFY_DATA` names.

    Args:
        folders: what it must hold, for the message.

    Raises:
        DataError: the variable is not set or names no folder.
    """
    root = os.environ.get("HF_PURIFY_DATA", "")
    if not root or not Path(root).is_dir():
        raise DataError(f"set HF_PURIFY_DATA to the folder with {', '.join(f'{f}/' for f in folders)}; it is '{root}'")
    return Path(root)


def attack(triggers: Mapping[str, str], trigger: str) -> str:
    """The trigger as `implant` and `measure` take it; of a network without a backdoor the first one."""
    return next(iter(triggers.values())) if trigger == CLEAN else triggers[trigger]


def held_out(labels: ArrayLike, each: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on, and `each` of every class for repairs to draw from, always the same."""
    given = np.asarray(labels)
    order = np.random.default_rng(0).permutation(len(given))
    held = np.concatenate([order[given[order] == c][:each] for c in np.unique(given)])
    return np.setdiff1d(np.arange(len(given)), held), held


def repair_of(parts: Mapping[str, Any], trigger: str, seed: int, samples: int, **settings: Any) -> PurifyRecipe:
    """A repair with samples from those `held` out of `parts`, measured on `test`."""
    return PurifyRecipe.make(clean=parts["held"], test=parts["test"], triggers=[trigger], seed=seed, samples=samples, **settings)


@dataclass(frozen=True)
class Matrix:
    """Victims x methods x seeds of one modality.

    Args:
        about: what the command line says of itself.
        recipe: makes the repair of `(network, trigger, seed, samples, folder)`.
        networks: network -> its triggers; `none` among them is a network without a backdoor.
        samples: clean samples of a repair.
        page: what the cells are collected for.
        cells: folder of the cells under the one that keeps victims and cells.
        default: the networks that run where none is asked for; all where it is empty.
        variants: `METHOD-VARIANT`: settings that are not the defaults, the same for all victims.
    """

    about: str | None
    recipe: Callable[[str, str, int, int, Path], PurifyRecipe]
    networks: Mapping[str, Sequence[str]]
    samples: int
    page: Page
    cells: str
    default: Sequence[str] = ()
    variants: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    def main(self) -> None:
        """Command line of the matrix."""
        everything = sorted(names("method"), key=lambda n: (not find("method", n).control, n == "nft", n))
        parser = argparse.ArgumentParser(description=self.about, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--networks", default=",".join(self.default or self.networks))
        parser.add_argument("--triggers", help="all that a network has, unless given")
        parser.add_argument("--methods", default=",".join([*everything, *self.variants]))
        parser.add_argument("--seeds", default="0", type=integers)
        parser.add_argument("--samples", type=int, default=self.samples)
        parser.add_argument("--folder", type=Path, default=Path("runs"))
        parser.add_argument("--write", action="store_true", help="only collect the cells and write RESULTS.md")
        chosen = parser.parse_args()
        try:
            self._check(chosen)
            if not chosen.write:
                self._run(chosen)
        except PurifyError as error:
            parser.error(str(error))
        collect(chosen.folder / self.cells, self.page.results)
        self.page.write()

    def _run(self, chosen: argparse.Namespace) -> None:
        """The cells that are missing."""
        for seed in chosen.seeds:
            for network in chosen.networks.split(","):
                known = self.networks[network]
                asked = chosen.triggers.split(",") if chosen.triggers else known
                for trigger in (t for t in asked if t in known):
                    self._victim(network, trigger, seed, chosen, floor=trigger != CLEAN and CLEAN in asked and CLEAN in known)

    def _check(self, chosen: argparse.Namespace) -> None:
        """Raises UnknownName before a victim is trained for a name that is none."""
        triggers = {t for known in self.networks.values() for t in known}
        for kind, given, known in (("network", chosen.networks, self.networks), ("trigger", chosen.triggers or "", triggers)):
            for name in filter(None, given.split(",")):
                if name not in known:
                    raise unknown(kind, name, known)
        for name in chosen.methods.split(","):
            if "-" in name and name not in self.variants:
                raise unknown("variant", name, self.variants)
            make_method(name.partition("-")[0], **self.variants.get(name, {}))

    def _victim(self, network: str, trigger: str, seed: int, chosen: argparse.Namespace, floor: bool) -> None:
        common = {"network": network, "trigger": trigger, "seed": seed, "samples": chosen.samples}
        recipe = partial(self.recipe, network, trigger, seed, chosen.samples, chosen.folder)
        try:
            run(recipe, chosen.folder / self.cells / network / trigger, common, chosen.methods.split(","), self.variants)
            if floor:
                self._floor(recipe(), common, chosen)
        except NotAVictim as error:
            log.warning("%s with %s: %s", network, trigger, error)

    def _floor(self, recipe: PurifyRecipe, common: Mapping[str, Any], chosen: argparse.Namespace) -> None:
        """What the trigger of a repair does to the network without a backdoor: it may turn a sample into another class by what it means."""
        network = common["network"]
        place = cell(chosen.folder / self.cells / network / common["trigger"], FLOOR, common)
        if not place.exists():
            clean = self.recipe(network, CLEAN, common["seed"], chosen.samples, chosen.folder)
            row = open_comparison(dataclasses.replace(recipe, model=clean.model)).unrepaired
            save(place, {**common, **row_of(row), "method": FLOOR, "kind": FLOOR})


def integers(given: str) -> list[int]:
    return [int(n) for n in given.split(",")]


def run(
    recipe: Callable[[], PurifyRecipe],
    place: Path,
    common: Mapping[str, Any],
    methods: Sequence[str],
    variants: Mapping[str, dict[str, Any]],
) -> None:
    """Run the missing cells of one victim, all from the same weights.

    Args:
        recipe: makes the repair's recipe; asked only where a cell is missing.
        place: folder of the victim's cells.
        common: `network`, `trigger`, `seed` and `samples`.
        variants: `METHOD-VARIANT`: settings that are not the defaults.
    """
    missing = [m for m in methods if not cell(place, m, common).exists()]
    if not missing:
        return
    comparison = open_comparison(recipe())
    save(cell(place, "none", common), {**common, **row_of(comparison.unrepaired)})
    for name in missing:
        try:
            done = comparison.repair(make_method(name.partition("-")[0], **variants.get(name, {})))
        except Diverged as error:  # no result, and no reason to stop
            log.warning("%s with %s, %s: %s", common["network"], common["trigger"], name, error)
            continue
        save(cell(place, name, common), {**common, **row_of(done.row), "method": name})


def cell(place: Path, method: str, common: Mapping[str, Any]) -> Path:
    return place / f"{method}-n{common['samples']}-s{common['seed']}.json"


def row_of(row: Row) -> dict[str, Any]:
    """One row of a report's table as plain values: of its first trigger, and what else is known of that."""
    trigger, *others = row.asr
    robust = row.robust_accuracy.get(trigger)
    found = {
        "method": row.name,
        "kind": row.kind,
        "clean_accuracy": row.clean_accuracy.to_dict() if row.clean_accuracy else None,
        "asr": row.asr[trigger].to_dict(),
        "robust_accuracy": robust.to_dict() if robust else None,
        "der": row.der.get(trigger),
        "seconds": row.seconds,
        "notes": {k: v for k, v in row.notes.items() if isinstance(v, (int, float, str, bool))},
    }
    more = {name.removeprefix(f"{trigger}, "): row.asr[name].to_dict() for name in others}
    return found | ({"utility": row.utility, "more": more} if row.utility else {})


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a cell under another name and rename it; of several processes the main one does."""
    if process() != 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(content, indent=1))


def collect(folder: Path, results: Path) -> list[dict[str, Any]]:
    """Join all cells below `folder` with those in `results` already; a cell that was run again wins."""
    known = json.loads(results.read_text("utf-8")) if results.exists() else []
    cells = {tuple(c[k] for k in KEYS): c for c in known}
    for path in sorted(folder.rglob("*.json")):
        c = json.loads(path.read_text("utf-8"))
        cells[tuple(c[k] for k in KEYS)] = c
    joined = [cells[k] for k in sorted(cells)]
    results.write_text(json.dumps(joined, indent=0) + "\n", "utf-8")
    return joined
