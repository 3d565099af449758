"""The test set and its triggered views, and how a model fares on them: before and after a repair, never during one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hf_purify import output
from hf_purify.adapter import Examples
from hf_purify.errors import ConfigError, DataError
from hf_purify.loop import evaluate
from hf_purify.metrics import Proportion, attack_success_rate, clean_accuracy, defense_effectiveness_rating, mcnemar, robust_accuracy
from hf_purify.recipe import Recipe, parse_spec
from hf_purify.registry import find_trigger
from hf_purify.report import Row, Sample
from hf_purify.session import Session
from hf_purify.triggers import Poisoned, make_rule, trigger_all


@dataclass
class Bench:
    """The test set and one triggered view per trigger."""

    clean: Examples | None
    triggered: dict[str, Poisoned] = field(default_factory=dict)


@dataclass
class Figures:
    """Predictions `(n,)` of one model on the clean test set and on each triggered view."""

    clean: Tensor | None
    triggered: dict[str, Tensor]


def open_bench(session: Session) -> Bench:
    """Read the test set and make one triggered view per trigger."""
    recipe = with_recorded_trigger(session)
    if recipe.test is None:
        if recipe.triggers:
            raise ConfigError("triggers can only be measured on test data: give test=... (--test)")
        return Bench(None)
    data = read_test(session, recipe)
    rule = make_rule(recipe.rule, recipe.target, session.classes)
    triggered: dict[str, Poisoned] = {}
    for spec in recipe.triggers:
        name, settings = parse_spec(spec)
        trigger = find_trigger(session.adapter, name, **settings)
        triggered[name if name not in triggered else spec] = trigger_all(data, trigger, rule, session.classes, recipe.seed)
    return Bench(data, triggered)


def with_recorded_trigger(session: Session) -> Recipe:
    """For a victim that `implant` made: measure with the trigger that its config records, unless others are named."""
    recipe, folder = session.recipe, session.loaded.folder
    recorded = output.recorded_backdoor(folder) if folder is not None else None
    if recorded is None or recipe.triggers or recipe.test is None:
        return recipe
    return dataclasses.replace(recipe, triggers=[recorded["trigger"]], rule=recorded["rule"], target=recorded["target"])


def read_test(session: Session, recipe: Recipe) -> Examples:
    """The split that is named, else the one called `test`, else what there is."""
    split = recipe.test_split or ("test" if recipe.test_split is None else None)
    try:
        return session.read(recipe.test, split, recipe.test_samples)
    except DataError as error:
        if recipe.test_split is not None or "no split" not in str(error):
            raise
        return session.read(recipe.test, samples=recipe.test_samples)


def figures(session: Session, bench: Bench) -> Figures:
    """Predict everything that a row of the table needs."""
    if bench.clean is None:
        return Figures(None, {})
    task = session.task(bench.clean)
    clean = evaluate(task, bench.clean, title="clean accuracy")
    return Figures(clean, {n: evaluate(task, p.examples, title=f"ASR {n}") for n, p in bench.triggered.items()})


def make_row(
    name: str,
    kind: str,
    found: Figures,
    before: Figures | None,
    bench: Bench,
    seconds: float | None = None,
    notes: dict[str, Any] | None = None,
) -> Row:
    """Turn predictions into one row of the table; DER and McNemar's p-value compare with `before`."""

    def asr(f: Figures, n: str) -> Proportion:
        return attack_success_rate(f.triggered[n], bench.triggered[n].labels, bench.triggered[n].targets)

    accuracy = clean_accuracy(found.clean, bench.clean.labels) if found.clean is not None and bench.clean is not None else None
    der: dict[str, float | None] = {}
    notes = dict(notes or {})
    if before is not None and before.clean is not None and found.clean is not None and accuracy is not None and bench.clean is not None:
        base = clean_accuracy(before.clean, bench.clean.labels).value
        der = {n: defense_effectiveness_rating(asr(before, n).value, asr(found, n).value, base, accuracy.value) for n in bench.triggered}
        notes["mcnemar_p"] = mcnemar(before.clean, found.clean, bench.clean.labels)
    ra = {n: robust_accuracy(found.triggered[n], p.labels, p.targets) for n, p in bench.triggered.items()}
    return Row(name, kind, accuracy, {n: asr(found, n) for n in bench.triggered}, ra, der, seconds, notes)


def samples_of(session: Session, bench: Bench, before: Figures, after: Figures, count: int = 6) -> list[Sample]:
    """A few test samples of different classes, clean and triggered, with the predictions before and after."""
    if bench.clean is None or before.clean is None or after.clean is None:
        return []
    labels = session.loaded.labels or [str(i) for i in range(session.classes)]
    found = []
    for name, view in bench.triggered.items():
        for i in [int((view.labels == c).nonzero()[0]) for c in view.labels.unique()[:count]]:
            j = int(view.rows[i])
            predictions: dict[str, Any] = {
                "clean_before": labels[int(before.clean[j])],
                "clean_after": labels[int(after.clean[j])],
                "triggered_before": labels[int(before.triggered[name][i])],
                "triggered_after": labels[int(after.triggered[name][i])],
            }
            pixels = {"clean": _pixels(bench.clean.raw(j)), "triggered": _pixels(view.examples.raw(i))}
            found.append(
                Sample(trigger=name, label=labels[int(view.labels[i])], target=labels[int(view.targets[i])], **predictions, **pixels)
            )
    return found


def _pixels(raw: Any) -> Any:
    return raw.permute(1, 2, 0).numpy() if isinstance(raw, Tensor) and raw.dim() == 3 else None
