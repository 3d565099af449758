"""Reports of the jobs: their rows, with where each figure comes from: model, clean data, method, versions, command, warnings."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import torch
from torch import Tensor

from hf_purify import output
from hf_purify.adapter import Examples
from hf_purify.bench import samples_of
from hf_purify.companions import oddities
from hf_purify.comparison import Comparison, Repair
from hf_purify.method import Context, Method
from hf_purify.report import NeuronLayer, Report
from hf_purify.rows import Row
from hf_purify.salience import relative_change
from hf_purify.session import Session
from hf_purify.sharding import Gathered
from hf_purify.streaming import Drawn


def remarks_of(session: Session, clean: Examples | None, test: Examples | None) -> list[str]:
    """What the modality has to say of the samples, and what streams did not show."""
    parts = {"clean samples": clean, "test samples": test}
    said = [remark for what, data in parts.items() if data is not None for remark in session.adapter.remarks(data, what)]
    return said + [remark for what, drawn in session.streams.items() for remark in remarks_of_stream(drawn, what, session.classes)]


def beside(session: Session) -> list[str]:
    """What is odd about the files beside the weights, which no repair touches."""
    folder = session.loaded.folder
    return [f"to look at, since no repair of weights changes it: {oddity}" for oddity in oddities(folder)] if folder else []


def remarks_of_stream(drawn: Drawn, what: str, classes: int) -> list[str]:
    """That a stream was longer than the rows that were looked at, if it was; `what` was drawn from it, for a model of so many classes."""
    if drawn.ended:
        return []
    missed = 0 if drawn.classes is None else classes - drawn.classes
    hint = f", in which {missed} of {classes} classes do not occur: look at more (--stream-rows)" if missed > 0 else ""
    return [f"{what} were drawn from {drawn.read:,} rows of a stream, which may have more{hint}"]


def make_report(session: Session, title: str, rows: list[Row], **parts: Any) -> Report:
    """A report with what is known of every job; `parts` are its other fields."""
    recipe = session.recipe
    known = {
        "checkpoint": describe_model(session),
        "test": describe_test(session),
        "versions": output.versions(),
        "seed": recipe.seed,
        "command": output.command(recipe),
    }
    return Report(title=title, task=session.loaded.task or session.adapter.task, rows=rows, **{**known, **parts})


def report_repair(comparison: Comparison, done: Repair, rows: list[Row], title: str | None = None) -> Report:
    """Everything about a repair."""
    session, index, verdict = comparison.session, comparison.context.index, done.verdict
    masks, scores = index.split(verdict.mask), index.split(verdict.scores)
    trained = verdict.folded or bool((verdict.mask == 1).all())  # else the mask says what happened to the weights
    before, after = Gathered(session.model, comparison.base), Gathered(session.model, done.state)
    changes = relative_change(index, before, after).tolist() if trained else [None] * len(index.groups)
    chosen = verdict.notes.get("threshold")
    report = make_report(
        session,
        title or f"{done.method.name} on {session.loaded.source}",
        rows,
        clean=describe_clean(session, comparison.clean, comparison.context),
        method={"name": done.method.name, "config": method_config(done.method)},
        layers=[NeuronLayer.of(g, masks[g.name], scores[g.name], c) for g, c in zip(index, changes, strict=True)],
        curve=[dict(p) for p in verdict.curve],
        curve_chosen=chosen if isinstance(chosen, float) else None,
        samples=samples_of(session, comparison.bench, comparison.before, done.figures),
        warnings=[*warnings_of(rows), *remarks_of(session, comparison.clean, comparison.bench.clean), *beside(session)],
    )
    return report.attach(session.model, index, verdict)


def method_config(method: Method) -> dict[str, Any]:
    """Settings of a method; of a sequence, those of each part."""
    parts = getattr(method, "methods", None)
    return {m.name: method_config(m) for m in parts} if parts else dataclasses.asdict(method.config)


def describe_model(session: Session) -> dict[str, Any]:
    """What is known of the model."""
    loaded = session.loaded
    repository = session.adapter.locate(loaded.source) if loaded.revision else None
    return {
        "source": loaded.source,
        **({"repository": repository} if repository and repository != loaded.source else {}),
        "revision": loaded.revision,
        **({"base": loaded.base} if loaded.base else {}),
        "kind": loaded.kind,
        "architecture": type(loaded.model).__name__,
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
        "classes": session.classes,
    }


def describe_clean(session: Session, clean: Examples, context: Context) -> dict[str, Any]:
    """What is known of the clean samples, with a digest of their content."""
    recipe = session.recipe
    digest = hashlib.sha256()
    for i in range(len(clean)):
        raw = clean.raw(i)
        digest.update(raw.numpy().tobytes() if isinstance(raw, Tensor) else repr(raw).encode())
    counts = torch.bincount(clean.labels, minlength=session.classes if session.classifies else 1)
    return {
        "source": name_of(getattr(recipe, "clean", None)),
        "revision": session.commits.get("clean samples"),
        "split": recipe.split,
        "samples": len(clean),
        **describe_stream(session),
        "per_class": f"{int(counts.min())}..{int(counts.max())}",
        "held_out": 0 if context.judged is context.data else len(context.judged),
        "augmentation": context.augmentation,
        "fingerprint": digest.hexdigest()[:32],
    }


def describe_test(session: Session) -> dict[str, Any]:
    """What is known of the test data; nothing where there are none."""
    recipe = session.recipe
    if recipe.test is None:
        return {}
    return {"source": name_of(recipe.test), "revision": session.commits.get("test samples"), "split": recipe.test_split}


def name_of(data: Any) -> str:
    """How data that a recipe was given are called."""
    return str(data) if isinstance(data, str) or hasattr(data, "__fspath__") else f"<{type(data).__name__}>"


def describe_stream(session: Session) -> dict[str, Any]:
    """How many rows were looked at, where samples were drawn from a stream, and whether these were all."""
    drawn = session.streams.get("clean samples")
    return {} if drawn is None else {"rows_read": drawn.read, "rows_are_all": drawn.ended}


def warnings_of(rows: list[Row]) -> list[str]:
    """What a reader must not overlook."""
    found = []
    first, last = rows[0], rows[1] if len(rows) > 1 else rows[0]
    for name, value in first.asr.items():
        if value.value < 0.9:
            found.append(
                f"the unrepaired model's ASR for {name} is {value}: under 90 %, so it is no victim of this trigger and the repair proves little"
            )
    if last is not first and first.clean_accuracy and last.clean_accuracy and first.clean_accuracy.value - last.clean_accuracy.value > 0.02:
        found.append(f"the repair cost {100 * (first.clean_accuracy.value - last.clean_accuracy.value):.1f} points of clean accuracy")
    for row in rows:
        if any(name.endswith("within max_loss") and not kept for name, kept in row.notes.items()):
            found.append(
                f"{row.name} cost more held-out accuracy than max_loss allows, with the mildest setting that it tries, too: begin milder"
            )
    return found
