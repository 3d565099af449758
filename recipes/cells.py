"""Cells of a results matrix: one repair of one victim each, kept as JSON, run once, and joined into tables."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import statistics
from collections import defaultdict
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
from hf_purify.metrics import defense_effectiveness_rating
from hf_purify.output import process
from hf_purify.recipe import PurifyRecipe
from hf_purify.registry import find, make_method, names
from hf_purify.report import Row

log = logging.getLogger(__name__)
CLEAN = "none"  # the trigger of a network without a backdoor
FLOOR = "floor"  # the row of what a trigger does to that
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
class Page:
    """`RESULTS.md` of a modality, made of the `results.json` beside it.

    Args:
        folder: where both lie.
        head: what a reader must know, as Markdown.
        unit: of the samples, such as `images`.
        untriggered: the trigger that a clean network's ASR is that of.
    """

    folder: Path
    head: str
    unit: str
    untriggered: str

    @property
    def results(self) -> Path:
        return self.folder / "results.json"

    def write(self) -> None:
        """Write the page."""
        cells = json.loads(self.results.read_text("utf-8")) if self.results.exists() else []
        (self.folder / "RESULTS.md").write_text(self.head + self.tables(cells), "utf-8")

    def tables(self, cells: list[dict[str, Any]]) -> str:
        """Summary, floors, and every cell; of models that answer freely, every cell."""
        rows = [c for c in cells if c["kind"] != FLOOR]
        if not all(c["clean_accuracy"] for c in rows):
            return freely(rows, self.unit)
        return summary(rows, self.unit) + floors(cells) + details(rows, self.unit, self.untriggered)


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


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def spread(values: list[float]) -> str:
    text = f"{100 * statistics.mean(values):.1f}"
    return text + (f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else "")


def asr_of(runs: list[dict[str, Any]]) -> str:
    """Attack success rate over seeds; of one run with its interval and the number of samples."""
    counted = [c for c in runs if c["asr"]["n"]]
    if not counted:
        return "nothing to count"
    text, first = spread([c["asr"]["value"] for c in counted]), counted[0]["asr"]
    return text if len(runs) > 1 else f"{text} [{percent(first['low'])}, {percent(first['high'])}] (n={first['n']})"


def groups(cells: list[dict[str, Any]], *keys: str) -> dict[tuple, list[dict[str, Any]]]:
    found: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for c in cells:
        found[tuple(c[k] for k in keys)].append(c)
    return found


def _der(cell: dict[str, Any]) -> float:
    return float(cell["der"])


def unrepaired(cells: list[dict[str, Any]]) -> dict[tuple, float]:
    """Clean accuracy by network and trigger."""
    return {(c["network"], c["trigger"]): c["clean_accuracy"]["value"] for c in cells if c["method"] == "none"}


def per_trigger(cells: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> list[float]:
    """A figure of each trigger, the mean of its seeds: a trigger with more seeds counts no more. Of a single trigger, those of its seeds."""
    found = [[value(c) for c in mine] for mine in groups(cells, "trigger").values()]
    return found[0] if len(found) == 1 else [statistics.mean(values) for values in found]


def overview(cells: list[dict[str, Any]], samples: int) -> str:
    """Methods x networks: mean DER over triggers / points of clean accuracy lost."""
    base = unrepaired(cells)
    attacked = [c for c in cells if c["method"] != "none" and c["trigger"] != CLEAN and c["samples"] == samples]
    triggers = {network: len({c["trigger"] for c in mine}) for (network,), mine in groups(attacked, "network").items()}
    rows = []
    for (method, kind), runs in groups(attacked, "method", "kind").items():
        mine = groups(runs, "network")
        texts = []
        for network, all_triggers in triggers.items():
            found = mine.get((network,), [])
            if not found:
                texts.append("-")
                continue
            lost = statistics.mean(per_trigger(found, lambda c: base[c["network"], c["trigger"]] - c["clean_accuracy"]["value"]))
            count = len({c["trigger"] for c in found})
            texts.append(
                f"{percent(statistics.mean(per_trigger(found, _der)))} / {percent(lost)}{f' ({count})' if count < all_triggers else ''}"
            )
        name = f"{method}{' (control)' if kind == 'control' else ''}"
        rows.append((kind == "control", -len(mine), -statistics.mean(c["der"] for c in runs), f"| {name} | {' | '.join(texts)} |\n"))
    head = " | ".join(f"{network} ({count})" for network, count in triggers.items())
    return f"| method | {head} |\n|---|{'---:|' * len(triggers)}\n" + "".join(row[-1] for row in sorted(rows))


def summary(cells: list[dict[str, Any]], unit: str) -> str:
    """One line per network and method: means over triggers, and the cost on the clean network.

    Args:
        unit: of the samples, such as `images`.
    """
    lines = ["\n## Summary\n"]
    base = unrepaired(cells)
    for (network, samples), mine in groups(cells, "network", "samples").items():
        rows = []
        for (method,), runs in groups([c for c in mine if c["method"] != "none"], "method").items():
            attacked = [c for c in runs if c["trigger"] != CLEAN]
            clean = [c for c in runs if c["trigger"] == CLEAN]
            if not attacked:
                continue
            lost = per_trigger(attacked, lambda c: base[c["network"], c["trigger"]] - c["clean_accuracy"]["value"])
            der = per_trigger(attacked, _der)
            cost = [base[network, CLEAN] - c["clean_accuracy"]["value"] for c in clean]
            rows.append(
                (
                    statistics.mean(der),
                    f"| {method}{' (control)' if runs[0]['kind'] == 'control' else ''} | {len({c['trigger'] for c in attacked})} | {spread(der)} | "
                    f"{percent(min(c['der'] for c in attacked))} | {spread(per_trigger(attacked, lambda c: c['asr']['value']))} | {spread(lost)} | "
                    f"{spread(cost) if cost else '-'} | {statistics.mean(c['seconds'] for c in attacked):.0f} |\n",
                )
            )
        if not rows:
            continue
        columns = "method | triggers | mean DER | worst DER | mean ASR | points lost | lost on the clean network | seconds"
        lines.append(f"\n### {network}, {samples} {unit}\n\n| {columns} |\n")
        lines.append("|---|---:|---:|---:|---:|---:|---:|---:|\n" + "".join(text for _, text in sorted(rows, reverse=True)))
    return "".join(lines)


def details(cells: list[dict[str, Any]], unit: str, untriggered: str) -> str:
    """Every network and trigger with all methods.

    Args:
        untriggered: the trigger that a clean network's ASR is that of.
    """
    lines = ["\n## Every cell\n"]
    for (network, trigger, samples), mine in groups(cells, "network", "trigger", "samples").items():
        title = f"no backdoor (ASR is that of {untriggered} on a clean network)" if trigger == CLEAN else trigger
        lines.append(
            f"\n### {network}, {title}, {samples} {unit}\n\n| method | seeds | ACC | ASR | robust accuracy | DER |\n|---|---:|---:|---:|---:|---:|\n"
        )
        order = sorted(groups(mine, "method").items(), key=lambda kv: (kv[0][0] != "none", -statistics.mean(c["der"] or 0 for c in kv[1])))
        for (method,), runs in order:
            first, asr = runs[0], asr_of(runs)
            der = spread([c["der"] for c in runs]) if first["der"] is not None else "-"
            kind = "" if first["kind"] == "method" else f" ({first['kind']})"
            acc, robust = (spread([c[k]["value"] for c in runs]) for k in ("clean_accuracy", "robust_accuracy"))
            lines.append(f"| {method}{kind} | {len(runs)} | {acc} | {asr} | {robust} | {der} |\n")
    return "".join(lines)


def freely(cells: list[dict[str, Any]], unit: str, relative: bool = False) -> str:
    """Models that answer freely: every cell, with what a repair costs beside the model as it came.

    Args:
        unit: of the samples, such as `texts`.
        relative: the cost as a share of the figure of use, else in its points.
    """
    lines = []
    for (network, trigger, samples), mine in groups(cells, "network", "trigger", "samples").items():
        first, more = mine[0]["utility"], mine[0]["more"]
        measure = next(iter(first))  # BLEU; perplexity where nothing is translated; mAP@50
        base = next(c["utility"][measure] for c in mine if c["method"] == "none")
        title = "no backdoor (ASR is that of the other's trigger)" if trigger == CLEAN else trigger
        columns = ["method", "seeds", "ASR", *more, *first, f"{measure} lost", "seconds"]
        lines.append(f"\n### {network}, {title}, {samples} {unit}\n\n| {' | '.join(columns)} |\n|---|{'---:|' * (len(columns) - 1)}\n")
        for (method,), runs in sorted(groups(mine, "method").items(), key=lambda kv: (kv[0][0] != "none", _mean_asr(kv[1]))):
            figures = [statistics.mean(c["utility"][name] for c in runs) for name in first]
            change = (base - figures[0]) * (-1 if measure == "Perplexity" else 1)
            kind = "" if runs[0]["kind"] == "method" else f" ({runs[0]['kind']})"
            others = [spread([c["more"][name]["value"] for c in runs]) for name in more]
            seconds = "-" if runs[0]["seconds"] is None else f"{statistics.mean(c['seconds'] for c in runs):.0f}"
            shown = [f"{figure:.1f}" for figure in figures]
            row = [
                f"{method}{kind}",
                len(runs),
                asr_of(runs),
                *others,
                *shown,
                percent(change / base) if relative else f"{change:.1f}",
                seconds,
            ]
            lines.append(f"| {' | '.join(map(str, row))} |\n")
    return "".join(lines)


def _mean_asr(runs: list[dict[str, Any]]) -> float:
    """Over the runs that had something to count; 1 where none had."""
    found = [c["asr"]["value"] for c in runs if c["asr"]["n"]]
    return statistics.mean(found) if found else 1.0


def floors(cells: list[dict[str, Any]]) -> str:
    """What each trigger does to the network without a backdoor, and the DER of a repair that costs nothing and ends there; none without such cells."""
    rows = []
    for (network, trigger), mine in groups([c for c in cells if c["kind"] == FLOOR], "network", "trigger").items():
        victim = next(c["asr"]["value"] for c in cells if (c["network"], c["trigger"], c["method"]) == (network, trigger, "none"))
        der = defense_effectiveness_rating(victim, mine[0]["asr"]["value"], 1.0, 1.0)
        rows.append(f"| {network} | {trigger} | {asr_of(mine[:1])} | {percent(der)} |\n")
    if not rows:
        return ""
    head = "\n## Without a backdoor\n\nA trigger says something of its own: a sentence with a *no* in it makes a review worse. What it does to the same network without a backdoor\n"
    return f"{head}is as low as a repair need go.\n\n| network | trigger | ASR | DER of a repair that ends there |\n|---|---|---:|---:|\n{''.join(rows)}"


def put_between(page: Path, start: str, end: str, text: str) -> None:
    """Replace what stands between two marks of a page, where it has them."""
    if not page.is_file():
        return
    before, first, rest = page.read_text("utf-8").partition(start)
    _, last, after = rest.partition(end)
    if first and last:
        page.write_text(before + start + "\n" + text + end + after, "utf-8")
