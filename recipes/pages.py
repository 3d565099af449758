"""Pages of results: tables in Markdown, made of cells."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_purify.metrics import defense_effectiveness_rating

CLEAN = "none"  # the trigger of a network without a backdoor
FLOOR = "floor"  # the row of what a trigger does to that


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
