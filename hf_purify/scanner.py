"""The scan: is there a backdoor, for which label, in which neurons, in which samples, with which trigger.

scan(recipe):
    clean, held_out  <- draw(recipe.clean, samples), split 80/20
    forgotten        <- the model with its clean task partly unlearned           # forgetting
    shortcuts        <- what a trigger towards each class costs, by kind         # shortcuts
    score            <- the oddest of these signals beside clean models          # calibration
    targets          <- classes beyond the outlier line
    triggers         <- recovered for the targets, judged on held-out samples    # recovery
    neurons          <- ranked by several signals                                # suspicion
    suspects         <- ranked by what the unlearned model says of them          # ranking
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_purify import output
from hf_purify.adapter import Examples, Loaded
from hf_purify.clean import make_context, read_clean
from hf_purify.diagnosis import Diagnosis, FoundTrigger
from hf_purify.errors import ConfigError, DataError
from hf_purify.forgetting import Forgotten, forget
from hf_purify.from_scan import weights_of
from hf_purify.inspection import look_at_clean, odd_samples, rank_suspects, shown_layers
from hf_purify.judgement import Judgement, judge
from hf_purify.method import Context
from hf_purify.ranking import Ranker
from hf_purify.recipe import ScanRecipe
from hf_purify.recovery import describe, recover_for
from hf_purify.reporting import describe_clean, describe_model, name_of, remarks_of
from hf_purify.session import Session, open_session
from hf_purify.shortcuts import Shortcut, shortcut
from hf_purify.stand_in import StandIn
from hf_purify.suspicion import ACTIVATION, CHANGE, agreement, neuron_signals, suspected
from hf_purify.tables import read_flags


def scan(model: Any, clean: Any, **settings: Any) -> Diagnosis:
    """Tell whether a model has a backdoor, from a few clean samples; see `ScanRecipe` for the settings.

    >>> found = scan("some-org/resnet-50", clean="org/dataset")  # doctest: +SKIP
    >>> found.suspicious, found.targets  # doctest: +SKIP
    """
    return run_scan(ScanRecipe.make(model=model, clean=clean, **settings))


@dataclass
class Looked:
    """What the signals say of a model.

    Args:
        forgotten: the unlearned model.
        shortcuts: by kind; of kinds that failed, why.
        seconds: by part.
    """

    forgotten: Forgotten
    shortcuts: dict[str, Shortcut] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def statistics(self) -> dict[str, float]:
        """What is calibrated, by signal."""
        return {kind: found.statistic for kind, found in self.shortcuts.items()}


@contextlib.contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Add the wall time of a block to a part's."""
    start = time.perf_counter()
    yield
    seconds[part] = round(seconds.get(part, 0.0) + time.perf_counter() - start, 2)


def look(ctx: Context) -> Looked:
    """All signals by class, from clean samples alone."""
    seconds: dict[str, float] = {}
    seed = ctx.generator.initial_seed()
    with timed(seconds, "unlearning"):
        looked = Looked(forget(ctx), seconds=seconds)
    for kind in ctx.adapter.stand_ins(ctx.model):
        with timed(seconds, f"triggers: {kind}"):
            ctx.generator.manual_seed(seed)  # so that no kind's outcome hangs on those before it
            looked.shortcuts[kind] = shortcut(ctx, kind)
    return looked


def run_scan(recipe: ScanRecipe) -> Diagnosis:
    """Scan the recipe's model; see the top of this module."""
    with output.folder(recipe.output, recipe.overwrite) as out:
        session, clean, ctx = open_scan(recipe)
        suspects = read_suspects(session, recipe)
        looked = look(ctx)
        found = diagnose(session, recipe, ctx, clean, looked, suspects)
        if out is not None:
            found.save(out)
    session.accelerator.wait_for_everyone()
    return found


def open_scan(recipe: ScanRecipe) -> tuple[Session, Examples, Context]:
    """The model, its clean samples, and what a method may see."""
    session = open_session(recipe)
    check_classes(session)
    clean = read_clean(session, recipe)
    return session, clean, make_context(session, clean, recipe.held_out)


def check_classes(session: Session) -> None:
    """Raises ConfigError where there are no classes to tell apart."""
    if not session.classifies:
        raise ConfigError(
            f"a scan looks for a class that triggers lead to, and this model ({session.loaded.task or session.adapter.task}) gives a sample no class of "
            "its own: not available. `hf-purify purify --method neural_cleanse` looks for triggers of such models itself"
        )
    if session.classes < 2:
        raise ConfigError(f"the model has {session.classes} class: with fewer than two, no trigger can lead from one to another")


def read_suspects(session: Session, recipe: ScanRecipe) -> tuple[Examples, torch.Tensor | None] | None:
    """The samples to rank, and which of them are known to carry a trigger, where a column says so."""
    if recipe.suspects is None:
        return None
    samples = session.read(recipe.suspects, recipe.suspects_split, what="suspects")
    truth = None
    if recipe.poisoned is not None:
        truth = read_flags(recipe.suspects, recipe.suspects_split, recipe.poisoned, session.commits["suspects"])
        if len(truth) != len(samples):
            raise DataError(f"the column '{recipe.poisoned}' has {len(truth)} values for {len(samples)} suspects")
    return samples, truth


def diagnose(
    session: Session,
    recipe: ScanRecipe,
    ctx: Context,
    clean: Examples,
    looked: Looked,
    suspects: tuple[Examples, torch.Tensor | None] | None,
) -> Diagnosis:
    """What the signals say, with the triggers, neurons and samples that go with it."""
    seconds, forgotten, loaded = looked.seconds, looked.forgotten, session.loaded
    calibration = session.adapter.calibration()
    judged = judge(looked.shortcuts, forgotten, calibration, recipe.threshold)
    with timed(seconds, "trigger"):
        made, triggers = find_triggers(ctx, loaded, judged, recipe.trigger_steps, looked)
    layers, ranked, agreed = [], "", {}
    index = ctx.neurons()
    if judged.suspicious:
        with timed(seconds, "neurons"):
            scores = neuron_signals(ctx, index, forgotten, made)
            ranked = ACTIVATION if ACTIVATION in scores else CHANGE
            layers, agreed = shown_layers(index, scores[ranked], suspected(index, scores[ranked])), agreement(scores)
    ranking, odd = None, []
    with timed(seconds, "samples"):
        ranker = Ranker(ctx, forgotten, judged.targets, made) if judged.targets or suspects else None
        if ranker and suspects:
            ranking = rank_suspects(ctx, loaded, ranker, suspects[0], name_of(recipe.suspects), suspects[1])
        if ranker and judged.targets:
            odd = odd_samples(ctx, ranker)
    return Diagnosis(
        title=f"Scan of {loaded.source}",
        task=loaded.task or session.adapter.task,
        suspicious=judged.suspicious,
        score=judged.score,
        threshold=recipe.threshold,
        kind=judged.kind,
        targets=judged.targets,
        labels=loaded.labels or [str(k) for k in range(session.classes)],
        signals=judged.signals,
        layers=layers,
        neurons=len(index),
        ranked_by=ranked,
        agreement=agreed,
        triggers=triggers,
        suspects=ranking,
        calibration=dict(calibration.facts) if calibration else {},
        warnings=[*look_at_clean(ctx, clean, session.classes, loaded.labels), *odd, *warnings_of(session, clean)],
        **described(session, recipe, ctx, clean),
        seconds=seconds,
    )


def find_triggers(ctx: Context, loaded: Loaded, judged: Judgement, steps: int, looked: Looked) -> tuple[StandIn | None, list[FoundTrigger]]:
    """Triggers recovered for the suspected classes; none where there is no class."""
    if not judged.targets:
        return None, []
    made = recover_for(ctx, judged.by, judged.targets, steps, looked.shortcuts[judged.by].found)
    return made, [describe(ctx, loaded, judged.by, made, position) for position in range(len(judged.targets))]


def described(session: Session, recipe: ScanRecipe, ctx: Context, clean: Examples) -> dict[str, Any]:
    """Where everything comes from."""
    return {
        "checkpoint": describe_model(session) | {"weights": weights_of(ctx)},
        "clean": describe_clean(session, clean, ctx),
        "config": {"samples": recipe.samples, "threshold": recipe.threshold, "trigger_steps": recipe.trigger_steps},
        "versions": output.versions(),
        "seed": recipe.seed,
        "command": output.command(recipe),
    }


def warnings_of(session: Session, clean: Examples) -> list[str]:
    """What a reader must not overlook."""
    calibration = session.adapter.calibration()
    if calibration is None:
        beside = f"scans of {session.adapter.name} are not calibrated: the verdict goes by an outlier rule, and there is no score"
    else:
        beside = (
            f"the score was calibrated on models for {calibration.facts.get('data of the models', 'other data')}; of models for other data more clean ones may be "
            "called suspicious: scan one that you trust, too"
        )
    return [*remarks_of(session, clean, None), beside]
