"""What a scan says of a population of models: the calibration of its score, and how often it is right.

    python -m hf_purify_recipes.calibrate vision            # scan what is missing; calibrate on the clean models
    python -m hf_purify_recipes.calibrate vision --write    # calibration and page from the scans that are there

Scans run in two passes, each kept by model: what the signals say; then, with the calibration of the first pass, the verdict and what goes with it.
`HF_PURIFY_DATA` names the data; `--folder` keeps models and scans.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from hf_purify.calibration import FILE, Calibration
from hf_purify.errors import NotAVictim
from hf_purify.files import replace_text
from hf_purify.forgetting import Forgotten, forget
from hf_purify.judgement import Judgement, judge
from hf_purify.method import Context
from hf_purify.metrics import Proportion
from hf_purify.plain import plain
from hf_purify.ranking import Ranker, auroc
from hf_purify.recipe import ScanRecipe
from hf_purify.recovery import describe, recover_for
from hf_purify.registry import find, find_trigger
from hf_purify.scanner import look, open_scan
from hf_purify.session import Session
from hf_purify.shortcuts import Shortcut, shortcut
from hf_purify.specs import parse_spec
from hf_purify.suspicion import agreement, change_by, neuron_signals, suspected
from hf_purify.task import put_back
from hf_purify.triggers import make_rule, trigger_all
from hf_purify_recipes.populations import PARTS, of_part

log = logging.getLogger(__name__)
SCORE = ScanRecipe.threshold  # above it a model is called suspicious
DATA = {"vision": "photographs of 32 pixels, CIFAR-10 and GTSRB", "text": "SST-2 and AG News, small encoders trained from random weights"}
NOTHING = Forgotten({}, {}, torch.eye(2), 0.0, 0, None)  # what the verdict does not depend on
SUSPECTS = 200  # test samples with, and as many without the trigger


def cell_of(folder: Path, modality: str, name: str, part: str) -> Path:
    return folder / "scans" / modality / part / f"{name}.json"


def load(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text("utf-8")) if path.exists() else None


def save(path: Path, cell: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(plain(dict(cell)), indent=1) + "\n")


def signals_cell(population: Any, member: Any, folder: Path) -> dict[str, Any]:
    """The first pass: what the signals say of a member."""
    session, _, ctx = open_scan(population.recipe_of(member, folder))
    looked = look(ctx)
    return {
        "name": member.name,
        "network": member.network,
        "kind": member.kind,
        "targets": list(member.targets),
        "backdoored": member.backdoored,
        "calibrates": member.calibrates,
        "data": member.dataset,
        "rule": member.rule,
        "part": member.part,
        "classes": session.classes,
        "statistics": looked.statistics,
        "costs": {kind: found.costs.tolist() for kind, found in looked.shortcuts.items()},
        "tried": [kind for kind, found in looked.shortcuts.items() if found.tried],
        "shares": looked.forgotten.shares.tolist(),
        "rows": looked.forgotten.rows.tolist() if looked.forgotten.rows is not None else None,
        "confusion": looked.forgotten.confusion.tolist(),
        "clean accuracy": ctx.accuracy(),
        "seconds": looked.seconds,
    }


def shortcuts_of(cell: Mapping[str, Any]) -> dict[str, Shortcut]:
    """What triggers cost, as the first pass kept it; infinite costs were written as null."""
    far = float("inf")
    costs = {kind: torch.tensor([far if c is None else c for c in found]) for kind, found in cell["costs"].items()}
    return {kind: Shortcut(kind, found, kind in cell["tried"]) for kind, found in costs.items()}


def verdict_cell(population: Any, member: Any, folder: Path, first: Mapping[str, Any], calibration: Calibration) -> dict[str, Any]:
    """The second pass: the verdict, the recovered trigger, and, where the trigger is known, neurons and samples beside it."""
    session, _, ctx = open_scan(population.recipe_of(member, folder))
    forgotten = forget(ctx)
    judged = judge(shortcuts_of(first), forgotten, calibration, SCORE)
    cell: dict[str, Any] = {
        "suspicious": judged.suspicious,
        "score": judged.score,
        "targets": judged.targets,
        "kind": judged.kind,
        "by": judged.by,
    }
    found = None
    if judged.targets:
        ctx.generator.manual_seed(ctx.generator.initial_seed())
        begun = shortcut(ctx, judged.by).found  # the first pass kept no triggers
        found = recover_for(ctx, judged.by, judged.targets, population.recipe_of(member, folder).trigger_steps, begun)
        triggers = [describe(ctx, session.loaded, judged.by, found, position) for position in range(len(judged.targets))]
        cell["triggers"] = [{"target": t.target, "asr": t.asr, "size": t.size, "words": t.words} for t in triggers]
        cell["inverted"] = inverted(session, ctx, forgotten, judged)
    if len(member.targets) == 1:
        cell |= truth(member, session, ctx, forgotten, judged, found)
    return cell


def truth(member: Any, session: Session, ctx: Context, forgotten: Forgotten, judged: Judgement, found: Any) -> dict[str, Any]:
    """How well samples and neurons are told, with the trigger known: nothing of this is known to a scan."""
    name, options = parse_spec(member.triggers[0])
    trigger = find_trigger(session.adapter, name, **options)
    rule = make_rule("all-to-one", member.targets[0], session.classes)
    test = session.read(member.split("test"), None, SUSPECTS, what="test samples")
    planted = trigger_all(test, trigger, rule, session.classes).examples
    ranker = Ranker(ctx, forgotten, judged.targets, found)
    ranked = torch.cat([ranker(data) for data in (planted, test)])
    area, interval = auroc(ranked, torch.arange(len(ranked)) < len(planted))
    index = ctx.neurons()
    view = ctx.data.overlay(torch.arange(len(ctx.data)), trigger, ctx.data.labels, 0)

    def place(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {k: v.to(ctx.device) for k, v in view.batch(torch.arange(len(batch["labels"]))).items()}

    cell: dict[str, Any] = {"auroc": area, "interval": interval, "suspects": [len(planted), len(test)]}
    if session.adapter.name != "text":  # a text with a trigger is longer: no activation of the one stands beside that of the other
        real = index.standardize(change_by(ctx, index, place))
        wanted = suspected(index, real)
        scores = neuron_signals(ctx, index, forgotten, found)
        cell["neurons"] = {
            signal: {
                "flagged": int(suspected(index, score).sum()),
                "right": int((suspected(index, score) & wanted).sum()),
                "true": int(wanted.sum()),
                "at as many": int(wanted[score.argsort(descending=True)[: int(wanted.sum())]].sum()),
            }
            for signal, score in scores.items()
        }
        cell["agreement"] = agreement(scores)
    return cell


def inverted(session: Session, ctx: Context, forgotten: Forgotten, judged: Judgement) -> dict[str, Proportion]:
    """What triggers recovered in the same few steps reach on the model as it came: from it, and from the unlearned one, as RNP proposes."""
    found = {}
    for name, state in (("as it came", forgotten.original), ("unlearned", forgotten.state)):
        put_back(ctx.model, state)
        trigger = recover_for(ctx, judged.by, judged.targets[:1], ScanRecipe.trigger_steps)
        put_back(ctx.model, forgotten.original)
        found[name] = describe(ctx, session.loaded, judged.by, trigger, 0).asr
    return found


def run(modality: str, folder: Path, part: str | None) -> None:
    """Scan what is missing."""
    population = importlib.import_module(f"hf_purify_recipes.{modality}.population")
    members = list(of_part(population.members(), part))
    first: dict[str, dict[str, Any]] = {}
    for member in tqdm(members, desc="signals"):
        place = cell_of(folder, modality, member.name, "signals")
        try:
            if not place.exists():
                save(place, signals_cell(population, member, folder))
        except NotAVictim as error:
            log.warning("%s: left out: %s", member.name, error)
            continue
        first[member.name] = load(place) or {}
    calibration = fit(first.values())
    for member in tqdm([m for m in members if m.name in first], desc="verdicts"):
        place = cell_of(folder, modality, member.name, "verdicts")
        if not place.exists():
            save(place, verdict_cell(population, member, folder, first[member.name], calibration))


def fit(cells: Iterable[Mapping[str, Any]]) -> Calibration:
    """The calibration, from all clean models that the score is to rest on."""
    return Calibration.fit([c["statistics"] for c in cells if c["calibrates"]])


def left_out(cells: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The score of each clean model by a calibration that it has no part in."""
    clean = [c for c in cells if not c["backdoored"]]
    return {c["name"]: fit([d for d in clean if d is not c]).score(c["statistics"]) for c in clean}


def of_calibrated_data(cells: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Models for the data sets that the calibration knows clean models of."""
    known = list(cells)
    data = {c["data"] for c in known if c["calibrates"]}
    return [dict(c) for c in known if c["data"] in data]


def collected(modality: str, folder: Path) -> list[dict[str, Any]]:
    """Both passes of every model that was scanned."""
    found = []
    for place in sorted((folder / "scans" / modality / "signals").glob("*.json")):
        second = load(cell_of(folder, modality, place.stem, "verdicts"))
        found.append({**(load(place) or {}), "verdict": second})
    return found


def facts(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """What a calibration says of itself: the models, false positives, and what was found."""
    cells = of_calibrated_data(cells)
    scores = left_out(cells)
    found = [judge(shortcuts_of(c), NOTHING, fit(cells), SCORE).suspicious for c in cells if len(c["targets"]) == 1]
    return {
        "data of the models": DATA[modality_of(cells)],
        "clean models": len(scores),
        "networks": ", ".join(sorted({c["network"] for c in cells})),
        f"clean models called suspicious at {SCORE:g}, each left out in its turn": str(
            Proportion(sum(s > SCORE for s in scores.values()), len(scores))
        ),
        f"backdoored models with one target found at {SCORE:g}": str(Proportion(sum(found), len(found))),
    }


def modality_of(cells: list[dict[str, Any]]) -> str:
    return "text" if "words" in cells[0]["statistics"] else "vision"


def write(modality: str, folder: Path) -> None:
    """The calibration beside the adapter, and the page of results."""
    from hf_purify_recipes import scans

    cells = collected(modality, folder)
    adapter = find("adapter", modality)
    beside = Path(str(importlib.import_module(adapter.__module__).__file__)).with_name(FILE)
    made = fit(cells)
    Calibration(made.signals, made.combined, facts(cells)).save(beside)
    home = Path(str(importlib.import_module(f"hf_purify_recipes.{modality}").__file__)).parent
    replace_text(home / "scans.json", json.dumps(cells, indent=1) + "\n")
    replace_text(home / "SCANS.md", scans.page(modality, cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modality", choices=("vision", "text"))
    parser.add_argument("--folder", type=Path, default=Path("runs"))
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--write", action="store_true", help="only write what is there")
    chosen = parser.parse_args()
    if not chosen.write:
        run(chosen.modality, chosen.folder, chosen.part)
    write(chosen.modality, chosen.folder)


if __name__ == "__main__":
    main()
