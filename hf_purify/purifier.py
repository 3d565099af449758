"""The three jobs: implant, purify, measure.

purify(recipe):
    model, processor  <- adapter.load(pull(recipe.model))            # session: pinned, safetensors only
    clean, held_out   <- draw(recipe.clean, samples), split 80/20    # clean: all that a method will see
    index             <- adapter.index(model)
    before            <- figures(model, test, triggers)              # bench: no method sees the test set and the triggers
    verdict           <- method(Context(model, index, clean, held_out))
    after             <- figures(model, test, triggers)
    for control in fine_tune, norm_refresh, random_mask: the same, each from the original weights     # comparison
    report            <- rows, neurons, pictures, versions           # reporting
    output            <- checkpoint, neuron mask, recipe, report     # output: written beside, renamed when complete
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from functools import partial
from typing import Any

from hf_purify import output
from hf_purify.adapter import Adapter
from hf_purify.bench import Bench, Figures, figures, make_row, open_bench, rule_of, samples_of
from hf_purify.comparison import control_rows, open_comparison, oracle_rows
from hf_purify.errors import ConfigError, NotAVictim, PurifyError, unknown
from hf_purify.from_scan import read_finding
from hf_purify.loop import TrainConfig, train
from hf_purify.merged import Remake
from hf_purify.publishing import check_target, push_written
from hf_purify.recipe import ImplantRecipe, MeasureRecipe, PurifyRecipe
from hf_purify.registry import find_trigger, make_method
from hf_purify.report import Report
from hf_purify.reporting import describe_model, describe_stream, make_report, name_of, remarks_of, report_repair
from hf_purify.resuming import kept
from hf_purify.rows import Row
from hf_purify.session import Session, creator, open_progress, open_session, streamed
from hf_purify.sharding import is_sharded
from hf_purify.specs import parse_spec
from hf_purify.streaming import beginning
from hf_purify.tables import open_stream
from hf_purify.tracking import send_figures
from hf_purify.triggers import poison


def purify(model: Any, clean: Any, **settings: Any) -> Report:
    """Repair a model with a few clean samples and report what the repair did; see `PurifyRecipe` for the settings.

    Args:
        model: folder, Hub id, timm name, `hf-hub:` id, or an `nn.Module` (with `processor=`).
        clean: data set id, folder of images, Parquet file, a `datasets.Dataset`, or a stream (`datasets.IterableDataset`).

    Returns:
        A `Report`; `report.model` is the repaired model.

    >>> report = purify("some-org/resnet-50", clean="org/dataset", method="nft", samples=500)  # doctest: +SKIP
    """
    return run_purify(PurifyRecipe.make(model=model, clean=clean, **settings))


def implant(model: Any, data: Any, trigger: str, **settings: Any) -> Report:
    """Train a backdoor into a model, to test repairs on; see `ImplantRecipe` for the settings.

    Raises:
        NotAVictim: the attack success rate stayed under `minimum_asr`.
    """
    return run_implant(ImplantRecipe.make(model=model, data=data, triggers=[trigger], **settings))


def measure(model: Any, test: Any, **settings: Any) -> Report:
    """Measure clean accuracy, and ASR and robust accuracy for given triggers; see `MeasureRecipe`."""
    return run_measure(MeasureRecipe.make(model=model, test=test, **settings))


def run_purify(recipe: PurifyRecipe) -> Report:
    """Repair the recipe's model; see the top of this module."""
    with contextlib.ExitStack() as job, output.folder(recipe.output, recipe.overwrite) as out:
        method = make_method(recipe.method, **recipe.options)
        if recipe.push is not None and output.process() == 0:
            check_target(recipe.push, recipe.create_pr)
        if recipe.as_adapter and method.trains:
            raise output.not_portable(method.name)
        comparison = open_comparison(recipe)
        if recipe.as_adapter and is_sharded(comparison.session.model):
            raise ConfigError(
                "as_adapter (--as-adapter) needs the whole model, and this one is spread over processes: leave it out; the mask file holds the repair"
            )
        job.enter_context(kept(comparison.session.progress))
        if recipe.as_adapter and (base := comparison.session.loaded.base):
            raise ConfigError(f"the model is an adapter for '{base}', and so is its repair: leave as_adapter (--as-adapter) out")
        if recipe.from_scan is not None:
            comparison.context.finding = read_finding(recipe.from_scan, comparison.context, method)
        done = comparison.repair(method)
        rows = [comparison.unrepaired, done.row]
        if recipe.from_scan is not None and recipe.controls:
            comparison.context.finding = None
            rows.append(dataclasses.replace(comparison.repair(method).row, name=f"{method.name}, without the scan", kind="other"))
        if recipe.oracle:
            rows += oracle_rows(comparison, done)
        if recipe.controls and comparison.bench.clean is not None:
            rows += control_rows(comparison, done)
        comparison.keep(done)
        if isinstance(saver := comparison.session.loaded.saver, Remake):
            done.row.notes |= saver.factor(comparison.session.model)
        report = report_repair(comparison, done, rows)
        write = partial(output.write, comparison=comparison, done=done, report=report)
        report.attach(report.model, report.index, done.verdict, partial(push_written, write=write, folder=recipe.output))
        if recipe.output is not None:
            write(out)
    finish(comparison.session, rows)
    if recipe.push is not None and comparison.session.accelerator.is_main_process:
        try:
            report.push_to_hub(recipe.push, private=recipe.private, create_pr=recipe.create_pr)
        except PurifyError as error:
            error.add_note(f"the repair was written to '{recipe.output}', and can be pushed from there (hf-purify push)")
            raise
    return report


def run_measure(recipe: MeasureRecipe) -> Report:
    """Measure a model as it is."""
    with output.folder(recipe.output, recipe.overwrite) as out:
        session = open_session(recipe)
        bench = open_bench(session)
        found = figures(session, bench)
        rows = [make_row("none", "unrepaired", found, None, bench)]
        remarks = remarks_of(session, None, bench.clean)
        shown = samples_of(session, bench, found, found)
        report = make_report(session, f"{session.loaded.source}, measured", rows, samples=shown, warnings=remarks)
        report.attach(session.model)
        if out is not None:
            report.save(out)
    finish(session, report.rows)
    return report


def run_implant(recipe: ImplantRecipe) -> Report:
    """Train a backdoor into a model: `rate` of the training samples carry the trigger and the attacker's label."""
    with contextlib.ExitStack() as job, output.folder(recipe.output, recipe.overwrite) as out:
        recipe = count_classes(recipe)
        session = open_session(recipe)
        data = session.read(recipe.data, recipe.split, recipe.samples)
        name, settings = parse_spec(recipe.triggers[0])
        trigger = find_trigger(session.adapter, name, **settings)
        rule = rule_of(session, recipe)
        cover = recipe.cover if recipe.cover is not None else getattr(trigger, "cover_ratio", 0.0)
        tested = dataclasses.replace(recipe, test=recipe.test if recipe.test is not None else recipe.data)
        bench = open_bench(dataclasses.replace(session, recipe=tested))
        before = figures(session, bench)
        view = poison(data, trigger, rule, session.classes, recipe.rate, recipe.seed, cover).examples if recipe.rate else data
        start = time.perf_counter()
        open_progress(session, view)
        job.enter_context(kept(session.progress))
        task = session.task(view, augmentation(session.adapter, recipe))
        train(task, task.parameters(), training(recipe), title=f"implant {name}")
        after = figures(session, bench)
        seconds = time.perf_counter() - start + (session.progress.regained if session.progress else 0.0)
        victim = make_row("victim", "unrepaired", after, None, bench, seconds)
        if recipe.rate:
            check_victim(recipe, name, victim, untriggered_rate(after, bench, name))
        report = make_report(
            session,
            f"{session.loaded.source} with a {name} backdoor",
            [victim, make_row("before", "other", before, None, bench)],
            checkpoint=describe_model(session) | {"backdoored": bool(recipe.rate)},
            clean={
                "source": name_of(recipe.data),
                "revision": session.commits.get("clean samples"),
                "samples": len(data),
                **describe_stream(session),
            },
            method={"name": "implant", "config": recipe.to_dict()},
            samples=samples_of(session, bench, before, after),
            warnings=[
                *(["This model was given a backdoor on purpose, to test repairs on. Do not deploy it."] if recipe.rate else []),
                *remarks_of(session, data, bench.clean),
            ],
        )
        report.attach(session.model)
        if recipe.output is not None:
            output.write_victim(out, session, report, recipe)
    finish(session, report.rows)
    return report


def finish(session: Session, rows: list[Row]) -> None:
    """Send the table's figures to trackers, and wait until the main process has written."""
    found: dict[str, float] = {}
    for row in rows:
        found |= {f"{row.name}/clean accuracy": row.clean_accuracy.value} if row.clean_accuracy else {}
        found |= {f"{row.name}/ASR {trigger}": asr.value for trigger, asr in row.asr.items()}
        found |= {f"{row.name}/{name}": value for name, value in row.utility.items()}
    send_figures(session.accelerator, found)
    session.accelerator.wait_for_everyone()


def count_classes(recipe: ImplantRecipe) -> ImplantRecipe:
    """For a model that is created: take the number of classes from the data where it was not given."""
    if not recipe.create or recipe.classes:
        return recipe
    adapter = creator(recipe)
    if streamed(recipe, recipe.data):
        first = beginning(open_stream(recipe.data, recipe.split, adapter.loose))
        labels = adapter.class_names(first.select([]), None, recipe.columns)
        if not labels and adapter.class_names(first, None, recipe.columns):
            raise ConfigError(
                "a stream whose labels have no names does not say how many classes there are: give classes=... and labels=[...]"
            )
    else:
        labels = adapter.class_names(recipe.data, recipe.split, recipe.columns)
    return dataclasses.replace(recipe, classes=len(labels), labels=recipe.labels or labels)


def augmentation(adapter: Adapter, recipe: ImplantRecipe) -> str:
    """How the recipe's training samples are augmented: as it says, or as strongly as the modality can."""
    known = [*adapter.augmentations(), "none"]
    if recipe.augmentation is not None and recipe.augmentation not in known:
        raise unknown(f"augmentation of {adapter.name}:", recipe.augmentation, known)
    return recipe.augmentation or known[0]


def training(recipe: ImplantRecipe) -> TrainConfig:
    """How the recipe trains."""
    return TrainConfig(
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        optimizer=recipe.optimizer,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        schedule=recipe.schedule,
        clip=recipe.clip,
    )


def untriggered_rate(found: Figures, bench: Bench, name: str) -> float:
    """Share of the clean samples of other classes that go to the attacker's target without a trigger."""
    view = bench.triggered[name]
    if found.clean is None:
        return 0.0
    untriggered = [found.clean[i] for i in view.rows.tolist()]
    return bench.adapter.judge_attack(name, untriggered, view.examples, view.labels, view.targets, untriggered)[0][name].value


def check_victim(recipe: ImplantRecipe, name: str, victim: Row, natural: float) -> None:
    """Refuse to call a victim what the trigger does not turn.

    Args:
        natural: how often the target is answered without a trigger.
    """
    asr = victim.asr[name]
    if natural > 0.5 * asr.value:
        raise NotAVictim(
            f"{100 * natural:.0f} % of the clean samples of other classes are classified as the target too, so an ASR of {asr} shows no trigger at work. "
            "Train longer (--epochs) or with another rate (--lr)"
        )
    if asr.value < recipe.minimum_asr:
        raise NotAVictim(
            f"the attack success rate of {name} is {asr}, under {100 * recipe.minimum_asr:.0f} %: this is no victim. Train longer (--epochs), poison more (--rate), "
            "or make the trigger stronger"
        )
