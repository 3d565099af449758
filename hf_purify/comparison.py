"""Repairs of one model, each from the same weights, and how each fared.

comparison = open_comparison(recipe)             # model, clean samples, test set; the model measured as it is
done = comparison.repair(make_method("nft"))     # any number of times
[comparison.unrepaired, done.row]                # rows of the report
comparison.keep(done)                            # the model is left as this repair made it
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from accelerate.logging import get_logger
from torch import Tensor

from hf_purify.adapter import Examples
from hf_purify.bench import Bench, Figures, figures, make_row, open_bench
from hf_purify.clean import make_context, read_clean
from hf_purify.masks import bake
from hf_purify.method import Context, Method, Verdict
from hf_purify.recipe import PurifyRecipe
from hf_purify.registry import find, names
from hf_purify.rows import Row
from hf_purify.session import Session, open_progress, open_session
from hf_purify.task import put_back, snapshot

log = get_logger(__name__)  # which speaks on the main process alone


@dataclass
class Repair:
    """What a method decided, the weights it left, and how they fared."""

    method: Method
    verdict: Verdict
    state: dict[str, Tensor]
    figures: Figures
    row: Row


@dataclass
class Comparison:
    """One model with the clean samples, the test set, its original weights and its figures before any repair."""

    session: Session
    clean: Examples
    bench: Bench
    context: Context
    base: dict[str, Tensor]
    before: Figures

    @property
    def unrepaired(self) -> Row:
        """The row of the model as it came."""
        return make_row("none", "unrepaired", self.before, None, self.bench)

    def repair(self, method: Method) -> Repair:
        """Run a method on the original weights, and measure what it left."""
        put_back(self.session.model, self.base)
        self.context.generator.manual_seed(self.session.recipe.seed)
        torch.manual_seed(self.session.recipe.seed)
        start, regained = time.perf_counter(), self._regained
        verdict = method(self.context)
        state = snapshot(self.session.model)
        seconds = time.perf_counter() - start + self._regained - regained
        after = figures(self.session, self.bench)
        kind = "control" if method.control else "method"
        return Repair(method, verdict, state, after, make_row(method.name, kind, after, self.before, self.bench, seconds, verdict.notes))

    @property
    def _regained(self) -> float:
        """Seconds of this job that an earlier run of it spent."""
        return self.session.progress.regained if self.session.progress else 0.0

    def keep(self, done: Repair) -> None:
        """Leave the model as a repair made it."""
        put_back(self.session.model, done.state)


def open_comparison(recipe: PurifyRecipe) -> Comparison:
    """Load the recipe's model, clean samples and test set, and measure the model as it is."""
    session = open_session(recipe)
    clean = read_clean(session, recipe)
    open_progress(session, clean)
    bench = open_bench(session)
    context = make_context(session, clean, recipe.held_out)
    return Comparison(session, clean, bench, context, snapshot(session.model), figures(session, bench))


def control_rows(comparison: Comparison, done: Repair) -> list[Row]:
    """Every other control (fine-tuning, statistics refresh alone, as many neurons removed at random)."""
    found = controls(int((done.verdict.mask < 0.5).sum()))
    return [comparison.repair(control).row for control in found if control.name != done.method.name]


def controls(removed: int) -> list[Method]:
    """The methods that are controls; those that remove neurons remove as many as the method they stand beside."""
    found = [find("method", n) for n in names("method")]
    return [c(**({"removed": removed} if hasattr(c.config_class, "removed") else {})) for c in found if c.control]


def oracle_rows(comparison: Comparison, done: Repair) -> list[Row]:
    """What choosing the pruning threshold with the true trigger and the test set would have given: an upper bound, no defence."""
    session, bench, verdict = comparison.session, comparison.bench, done.verdict
    if not verdict.curve or not bench.triggered or verdict.folded:
        log.warning("the oracle needs a single method that sweeps a threshold, a trigger and a test set; skipped")
        return []
    best: Row | None = None
    for point in verdict.curve:
        put_back(session.model, comparison.base)
        mask = (verdict.scores <= point["cut"]).float().to(session.accelerator.device)
        bake(session.model, comparison.context.index, mask)
        notes = {"threshold": point["threshold"]}
        row = make_row(done.method.name, "oracle", figures(session, bench), comparison.before, bench, None, notes)
        if best is None or sum(v or 0 for v in row.der.values()) > sum(v or 0 for v in best.der.values()):
            best = row
    return [best] if best else []
