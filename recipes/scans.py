"""The page of what scans said of a population: rates with intervals, every model, every signal by itself, neurons and samples."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from hf_purify.calibration import Null
from hf_purify.metrics import Proportion

from .calibrate import SCORE, left_out, of_calibrated_data
from .populations import PARTS

Cell = Mapping[str, Any]
HEAD = """# {title}: what a scan says of models with and without a backdoor

Written by `python -m hf_purify_recipes.calibrate {modality} --write` from `scans.json`; every figure comes from a run ({samples} clean samples{draws}).

- A model is called suspicious where its score is above {score:g}. The score comes from the clean models alone: no backdoored model has a part in it. Clean models are judged by a calibration that each is left out
  of.
- The models of the part `calibrate` were looked at while the scan was made; those of `held-out` have other seeds, targets and
  settings of the triggers ({other}). {moved}What each is, and how it is trained again: `recipes/{modality}/population.py`.
- Intervals are 95 %, Wilson's of shares, Hanley and McNeil's of an AUROC.

"""


MOVED = (
    "ResNet-44 and ResNet-56 were to be held out, and were moved to `calibrate` when the first of them was called suspicious. Then the search was changed (all "
    "classes on the same samples) with both parts in view; those of the part `fresh` were trained afterwards: other data, seeds, targets and settings. When they had been scanned once, "
    "every model was given clean samples of its own (before, all had seen the same ones, which hid how far a verdict hangs on them), waves more samples, and "
    "classes were left behind later. "
)


def page(modality: str, cells: list[dict[str, Any]]) -> str:
    """The page as Markdown."""
    known = {
        "vision": ("Image classification", "500", "and an architecture: a timm ResNet"),
        "text": ("Text classification", "200", "and an architecture: ELECTRA"),
    }
    title, samples, other = known[modality]
    moved = MOVED if modality == "vision" else ""
    same = of_calibrated_data(cells)
    single = [c for c in same if len(c["targets"]) < 2]
    parts = [
        HEAD.format(
            title=title,
            modality=modality,
            samples=samples,
            draws=", drawn for each model anew" if modality == "vision" else ", seed 0",
            other=other,
            moved=moved,
            score=SCORE,
        ),
        rates(single),
        by_trigger(single),
        several(cells),
        elsewhere([c for c in cells if c["data"] not in {d["data"] for d in same}], cells),
        signals(single),
    ]
    return "".join(
        [
            *parts,
            neurons(single),
            agreements(single),
            inverted(single),
            samples_table(single),
            poisoned_clean() if modality == "vision" else "",
            details(cells),
        ]
    )


def table(heads: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    names = list(heads)
    lines = [names, ["---"] + ["---:"] * (len(names) - 1), *[[str(c) for c in row] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n\n"


def judged(cells: Iterable[Cell], part: str | None = None) -> list[Cell]:
    return [c for c in cells if c["verdict"] and part in (None, c["part"])]


def share(cells: Iterable[Cell], test: Callable[[Cell], bool]) -> str:
    found = [test(c) for c in cells]
    return str(Proportion(sum(found), len(found))) if found else "-"


def right_label(cell: Cell) -> bool:
    return sorted(cell["verdict"]["targets"]) == sorted(cell["targets"])


def rates(cells: list[dict[str, Any]]) -> str:
    scores = left_out(cells)
    rows = []
    known = [p for p in PARTS if any(c["part"] == p for c in cells)]
    for parts in [*((p,) for p in known), *([tuple(known[1:])] if len(known) > 2 else [])]:
        found = [c for c in cells if c["part"] in parts]
        clean = [c for c in found if not c["backdoored"]]
        planted = [c for c in judged(found) if c["backdoored"]]
        told = [c for c in planted if c["verdict"]["suspicious"]]
        called = share(clean, lambda c: scores[c["name"]] > SCORE)
        rows.append([" and ".join(parts), called, share(planted, lambda c: c["verdict"]["suspicious"]), share(told, right_label)])
    heads = ["part", "clean models called suspicious", "backdoors found", "right label, of those"]
    return "## Rates\n\n" + table(heads, rows)


def by_trigger(cells: list[dict[str, Any]]) -> str:
    groups: dict[str, list[Cell]] = defaultdict(list)
    for c in judged(cells):
        if c["backdoored"]:
            groups[c["kind"]].append(c)
    rows = []
    for kind, found in sorted(groups.items()):
        told = [c for c in found if c["verdict"]["suspicious"]]
        asrs = [t["asr"]["value"] for c in told if right_label(c) for t in c["verdict"].get("triggers", [])]
        rows.append(
            [
                kind,
                f"{len(told)} of {len(found)}",
                f"{sum(right_label(c) for c in told)} of {len(told)}",
                ", ".join(sorted({c["verdict"]["by"] for c in told})) or "-",
                f"{100 * statistics.fmean(asrs):.0f}, worst {100 * min(asrs):.0f}" if asrs else "-",
            ]
        )
    heads = ["backdoor", "found", "right label", "by", "ASR of the recovered trigger, mean, %"]
    return "## By trigger, all parts\n\nThe recovered trigger's ASR is measured on held-out clean samples of other classes.\n\n" + table(
        heads, rows
    )


def several(cells: list[dict[str, Any]]) -> str:
    """Backdoors that lead to several classes."""
    found = [c for c in judged(cells) if len(c["targets"]) > 1]
    if not found:
        return ""
    rows = [
        [
            c["name"],
            "each class to the next" if c["rule"] == "all-to-all" else ", ".join(map(str, c["targets"])),
            said(c),
            f"{c['verdict']['score']:.3f}",
        ]
        for c in found
    ]
    wrong = Proportion(sum(c["verdict"]["kind"] == "single-target" for c in found), len(found))
    text = f"Called single-target, which none of them is: {wrong}.\n\n"
    return "## Several targets\n\n" + text + table(["model", "true targets", "verdict", "score"], rows)


def elsewhere(cells: list[dict[str, Any]], known: list[dict[str, Any]]) -> str:
    """Models for data that the calibration knows no clean model of."""
    if not cells:
        return ""
    scores = left_out(known)
    single = [c for c in cells if len(c["targets"]) < 2]
    rows = [
        [c["name"], "yes" if c["backdoored"] else "no", f"{scores.get(c['name'], c['verdict']['score']):.3f}", said(c)]
        for c in judged(single)
    ]
    text = (
        "Handwritten digits, of which the calibration knows no model: a stroke makes one digit of another, so that clean models have short ways between classes, too. "
        "A score of such models says nothing.\n\n"
    )
    return "## Data of another kind\n\n" + text + table(["model", "backdoor", "score", "verdict"], rows)


def said(cell: Cell) -> str:
    """The verdict of a scan."""
    v = cell["verdict"]
    return v["kind"] + (f": {', '.join(map(str, v['targets']))}" if v["targets"] else "")


def signals(cells: list[dict[str, Any]]) -> str:
    """How often each signal by itself finds a single-target backdoor, at the line that one clean model in ten passes."""
    clean = [c for c in cells if not c["backdoored"]]
    single = [c for c in cells if len(c["targets"]) == 1]
    rows = []
    values: dict[str, Callable[[Cell], float]] = {
        **{kind: (lambda c, k=kind: c["statistics"][k]) for kind in clean[0]["statistics"]},
        "unlearned model": lambda c: max(c["shares"]),
    }
    if all(c["rows"] for c in cells if c["classes"] > 4) and clean[0]["classes"] > 4:
        values["classifier rows"] = lambda c: outlier(c["rows"])
    for name, value in values.items():
        null = Null.of([value(c) for c in clean])
        line = null.value_at(1 - SCORE)
        rows.append([name, f"{null.mean:.2f} ± {null.std:.2f}", f"{line:.2f}", share(single, lambda c, v=value, at=line: v(c) > at)])
    text = "`unlearned model` and `classifier rows` are shown by a scan and take no part in its verdict.\n\n"
    return "## Each signal by itself\n\n" + text + table(["signal", "on clean models", "line", "single-target backdoors beyond it"], rows)


def outlier(rows: list[float]) -> float:
    import torch

    from hf_purify.salience import mad_scores

    return float(mad_scores(torch.tensor(rows)).max())


def neurons(cells: list[dict[str, Any]]) -> str:
    found: dict[str, list[Mapping[str, int]]] = defaultdict(list)
    for c in judged(cells):
        for signal, counts in (c["verdict"].get("neurons") or {}).items():
            found[signal].append(counts)
    if not found:
        return ""
    rows = []
    for signal, counts in found.items():
        flagged, right, true, at = (sum(c[k] for c in counts) for k in ("flagged", "right", "true", "at as many"))
        rows.append([signal, len(counts), Proportion(right, flagged) if flagged else "-", Proportion(right, true), Proportion(at, true)])
    text = (
        "Truth: neurons whose activation the real trigger moves by more than three standard deviations beyond the mean of their layer, a tenth of a layer at most. Flagged: those "
        "whose score is as far out. At as many: of the highest scores, as many as there are true ones. `trigger activation` uses the recovered trigger, where one was found.\n\n"
    )
    heads = ["signal", "models", "precision of the flagged", "recall of the flagged", "precision at as many"]
    return "## Neurons\n\n" + text + table(heads, sorted(rows, key=lambda r: -float(str(r[4]).split(" ")[0])))


def agreements(cells: list[dict[str, Any]]) -> str:
    """How far the signals of neurons rank them alike, and what the unlearned model is worth for recovering triggers."""
    found: dict[str, list[float]] = defaultdict(list)
    for c in judged(cells):
        for pair, value in (c["verdict"].get("agreement") or {}).items():
            found[pair].append(value)
    if not found:
        return ""
    rows = [[pair, len(v), f"{statistics.fmean(v):.2f}", f"{min(v):.2f} to {max(v):.2f}"] for pair, v in found.items()]
    text = "Rank correlation (Spearman) over a model's neurons.\n\n"
    return (
        "## Agreement of the neuron signals\n\n"
        + text
        + table(["signals", "models", "mean", "range"], sorted(rows, key=lambda r: -float(r[2])))
    )


def inverted(cells: list[dict[str, Any]]) -> str:
    """Where triggers are better recovered from."""
    found = [c for c in judged(cells) if c["verdict"].get("inverted")]
    if not found:
        return ""
    by: dict[str, list[Cell]] = defaultdict(list)
    for c in found:
        by[c["verdict"]["by"]].append(c)
    rows = []
    for kind, some in by.items():
        asrs = [statistics.fmean(c["verdict"]["inverted"][name]["value"] for c in some) for name in ("as it came", "unlearned")]
        rows.append([kind, len(some), *(f"{100 * a:.0f}" for a in asrs)])
    text = (
        "Triggers recovered in the same few steps, from the model as it came and from the unlearned one (as RNP proposes); what they reach on the model as it came, mean over "
        "suspicious models, %. A scan recovers them from the model as it came.\n\n"
    )
    return (
        "## Recovered from the unlearned model\n\n"
        + text
        + table(["kind", "models", "from the model as it came", "from the unlearned model"], rows)
    )


def poisoned_clean() -> str:
    """What happens where some of the clean samples carry the trigger, as `recipes/vision/poisoned_clean.py` measured it."""
    cells = json.loads(Path(__file__).with_name("vision").joinpath("poisoned_clean.json").read_text("utf-8"))
    rows = []
    for rate in sorted({c["rate"] for c in cells}):
        some = [c for c in cells if c["rate"] == rate]
        right = share(some, lambda c: c["targets"] == [c["target"]])
        rows.append([f"{100 * rate:g} %", right, share(some, lambda c: bool(c["warned"]))])
    figures = [(method, what) for method in ("neural_cleanse", "fine_tune") for what in ("ASR", "ACC")]
    repairs = [[c["victim"], f"{100 * c['rate']:g} %", *(c[m]["after"][what] for m, what in figures)] for c in cells if "fine_tune" in c]
    text = (
        "`python -m hf_purify_recipes.vision.poisoned_clean`, seed 0: of 500 clean samples some carry the trigger and the attacker's label. In how many models the scan finds the label, and in how many "
        "it warns of the samples.\n\n"
    )
    return (
        "## A clean set that is poisoned\n\n"
        + text
        + table(["poisoned", "found, with the right label", "warned of the samples"], rows)
        + "What repairs with the same samples leave:\n\n"
        + table(["model", "poisoned", *(f"{what} after `{m}`" for m, what in figures)], repairs)
    )


def samples_table(cells: list[dict[str, Any]]) -> str:
    rows = []
    for c in sorted(judged(cells), key=lambda c: (c["kind"], c["name"])):
        area = c["verdict"].get("auroc")
        if area is not None:
            low, high = c["verdict"]["interval"]
            n, m = c["verdict"]["suspects"]
            rows.append([c["name"], c["kind"], c["part"], f"{area:.3f} [{low:.3f}, {high:.3f}]", f"{n} / {m}"])
    if not rows:
        return ""
    return "## Samples\n\nTest samples with the real trigger beside others.\n\n" + table(
        ["model", "trigger", "part", "AUROC", "with / without"], rows
    )


def details(cells: list[dict[str, Any]]) -> str:
    rows, scores = [], left_out(cells)
    for c in sorted(cells, key=lambda c: (c["part"], c["backdoored"], c["name"])):
        v = c["verdict"] or {}
        triggers = "; ".join(
            f"{t['target']}: {100 * t['asr']['value']:.0f} % (n={t['asr']['n']}) {t['words']}" for t in v.get("triggers", [])
        )
        largest = ", ".join(f"{k} {x:.2f}" for k, x in c["statistics"].items())
        rows.append(
            [
                c["name"],
                c["part"],
                ", ".join(map(str, c["targets"])) or "-",
                f"{scores.get(c['name'], v.get('score', math.nan)):.3f}",
                said(c) if v else "-",
                v.get("by", "-") if v.get("suspicious") else "-",
                triggers or "-",
                largest,
                f"{sum(c['seconds'].values()):.0f}",
            ]
        )
    heads = ["model", "part", "true target", "score", "verdict", "by", "recovered trigger's ASR", "statistics", "seconds"]
    return "## Every model\n\nSeconds of all signals, on a machine that ran other things, too.\n\n" + table(heads, rows).rstrip() + "\n"
