"""The test set and its triggered views, and how a model fares on them: before and after a repair, never during one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_purify import output
from hf_purify.adapter import Adapter, Examples
from hf_purify.errors import ConfigError, DataError
from hf_purify.metrics import Proportion, defense_effectiveness_rating, mcnemar
from hf_purify.recipe import Recipe
from hf_purify.registry import find_trigger
from hf_purify.report import Sample
from hf_purify.rows import Row
from hf_purify.session import Session
from hf_purify.specs import parse_spec
from hf_purify.task import observe
from hf_purify.triggers import AllToAll, AllToOne, Poisoned, make_rule, trigger_all


@dataclass
class Bench:
    """The test set and one triggered view per trigger, with the modality that judges what a model does with them."""

    adapter: Adapter
    clean: Examples | None
    triggered: dict[str, Poisoned] = field(default_factory=dict)


@dataclass
class Figures:
    """What one model did with each sample of the clean test set and of each triggered view, and how its adapter judges that.

    Args:
        clean: an observation of each clean sample; None where there is no test set.
        triggered: by trigger.
        accuracy, utility: as `Adapter.judge` gives them.
        asr, robust: as `Adapter.judge_attack` gives them, of all triggers.
    """

    clean: list[Any] | None = None
    triggered: dict[str, list[Any]] = field(default_factory=dict)
    accuracy: Proportion | None = None
    utility: dict[str, float] = field(default_factory=dict)
    asr: dict[str, Proportion] = field(default_factory=dict)
    robust: dict[str, Proportion] = field(default_factory=dict)


def open_bench(session: Session) -> Bench:
    """Read the test set and make one triggered view per trigger."""
    recipe = with_recorded_trigger(session)
    if recipe.test is None:
        if recipe.triggers:
            raise ConfigError("triggers can only be measured on test data: give test=... (--test)")
        return Bench(session.adapter, None)
    session.adapter.check_judge(session.loaded)
    data = read_test(session, recipe)
    rule = rule_of(session, recipe)
    triggered: dict[str, Poisoned] = {}
    for spec in recipe.triggers:
        name, settings = parse_spec(spec)
        trigger = find_trigger(session.adapter, name, **settings)
        view = trigger_all(data, trigger, rule, session.classes, recipe.seed)
        if not len(view.rows):
            raise DataError(f"all test samples are of the target class {recipe.target} already: give some of other classes")
        triggered[name if name not in triggered else spec] = view
    return Bench(session.adapter, data, triggered)


def rule_of(session: Session, recipe: Recipe) -> AllToOne | AllToAll:
    """The recipe's target rule. A model that answers freely has no target class: its trigger says what the attacker wants.

    Raises:
        ConfigError: it has one, or another rule than all-to-one.
    """
    if session.classifies:
        return make_rule(recipe.rule, recipe.target, session.classes)
    if recipe.target not in (0, 1):
        raise ConfigError(f"this model has no classes, so no target class (--target): its trigger has an output; got {recipe.target}")
    rule = make_rule(recipe.rule, 1)
    if rule.name != AllToOne.name:
        raise ConfigError(f"this model has no classes: the rule must be {AllToOne.name}, got {rule.name}")
    return rule


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
        return session.read(recipe.test, split, recipe.test_samples, what="test samples")
    except DataError as error:
        if recipe.test_split is not None or "no split" not in str(error):
            raise
        return session.read(recipe.test, samples=recipe.test_samples, what="test samples")


def figures(session: Session, bench: Bench) -> Figures:
    """Observe everything that a row of the table needs."""
    if bench.clean is None:
        return Figures()
    task = session.task(bench.clean)
    clean = observe(task, bench.clean, session.loaded, title="clean accuracy")
    found = Figures(clean, {}, *bench.adapter.judge(clean, bench.clean))
    for name, view in bench.triggered.items():
        found.triggered[name] = observe(task, view.examples, session.loaded, title=f"ASR {name}")
        untriggered = [clean[i] for i in view.rows.tolist()]
        asr, robust = bench.adapter.judge_attack(name, found.triggered[name], view.examples, view.labels, view.targets, untriggered)
        found.asr |= asr
        found.robust |= robust
    return found


def make_row(
    name: str,
    kind: str,
    found: Figures,
    before: Figures | None,
    bench: Bench,
    seconds: float | None = None,
    notes: dict[str, Any] | None = None,
) -> Row:
    """Turn figures into one row of the table; DER and McNemar's p-value compare with `before`."""
    der: dict[str, float | None] = {}
    notes = dict(notes or {})
    if before is not None and before.accuracy is not None and found.accuracy is not None and bench.clean is not None:
        base, accuracy = before.accuracy.value, found.accuracy.value
        der = {n: defense_effectiveness_rating(before.asr[n].value, asr.value, base, accuracy) for n, asr in found.asr.items()}
        notes["mcnemar_p"] = mcnemar(torch.tensor(before.clean), torch.tensor(found.clean), bench.clean.labels)
    return Row(name, kind, found.accuracy, found.asr, found.robust, der, seconds, notes, found.utility)


def samples_of(session: Session, bench: Bench, before: Figures, after: Figures, count: int = 6) -> list[Sample]:
    """A few test samples of different classes, clean and triggered, with the predictions before and after."""
    if bench.clean is None or before.clean is None or after.clean is None:
        return []
    adapter, loaded = session.adapter, session.loaded
    found = []
    for name, view in bench.triggered.items():
        firsts = [int((view.labels == c).nonzero()[0]) for c in view.labels.unique()[:count]] if session.classifies else range(count)
        for i in firsts[: len(view.rows)]:
            j = int(view.rows[i])
            clean, triggered = bench.clean.raw(j), view.examples.raw(i)
            label, target = adapter.wishes(triggered, int(view.labels[i]), int(view.targets[i]), loaded)
            found.append(
                Sample(
                    trigger=name,
                    label=label,
                    target=target,
                    clean_before=adapter.say(before.clean[j], loaded),
                    clean_after=adapter.say(after.clean[j], loaded),
                    triggered_before=adapter.say(before.triggered[name][i], loaded),
                    triggered_after=adapter.say(after.triggered[name][i], loaded),
                    clean_text=adapter.words(clean),
                    triggered_text=adapter.words(triggered),
                    clean=adapter.picture(clean, None, (before.clean[j], after.clean[j])),
                    triggered=adapter.picture(triggered, clean, (before.triggered[name][i], after.triggered[name][i])),
                )
            )
    return found
