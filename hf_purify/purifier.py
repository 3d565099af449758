"""The three jobs: implant, purify, measure.

purify(recipe):
    model, processor  <- adapter.load(pull(recipe.model))            # pinned, safetensors only
    clean, held_out   <- draw(recipe.clean, samples), split 80/20    # all that a method will see
    index             <- adapter.index(model)
    before            <- figures(model, test, triggers)              # the test set and the triggers stay in this file
    verdict           <- method(Context(model, index, clean, held_out))
    after             <- figures(model, test, triggers)
    for control in fine_tune, norm_refresh, random_mask: the same, each from the original weights
    report            <- rows, neurons, pictures, versions
    output            <- checkpoint, neuron mask, recipe, report     # written beside, renamed when complete
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from hf_purify import hub, output
from hf_purify.adapter import Adapter, Examples, Loaded
from hf_purify.errors import ConfigError, DataError, NotAVictim
from hf_purify.loop import Task, TrainConfig, evaluate, train
from hf_purify.masks import bake
from hf_purify.method import Context, Method, Verdict
from hf_purify.metrics import Proportion, attack_success_rate, clean_accuracy, defense_effectiveness_rating, mcnemar, robust_accuracy
from hf_purify.recipe import ImplantRecipe, MeasureRecipe, PurifyRecipe, Recipe, parse_spec
from hf_purify.registry import find, find_trigger, make_method, names
from hf_purify.report import NeuronLayer, Report, Row, Sample
from hf_purify.triggers import Poisoned, make_rule, poison, trigger_all

log = logging.getLogger(__name__)


def purify(model: Any, clean: Any, **settings: Any) -> Report:
    """Repair a model with a few clean samples and report what the repair did; see `PurifyRecipe` for the settings.

    Args:
        model: folder, Hub id, timm name, `hf-hub:` id, or an `nn.Module` (with `processor=`).
        clean: data set id, folder of images, Parquet file, or a `datasets.Dataset`.

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


@dataclass
class Session:
    """A loaded model on its device, with its modality."""

    recipe: Recipe
    adapter: Adapter
    accelerator: Accelerator
    loaded: Loaded
    classes: int

    @property
    def model(self) -> torch.nn.Module:
        return self.loaded.model

    def task(self, data: Examples, augmentation: str = "none") -> Task:
        generator = torch.Generator().manual_seed(self.recipe.seed)
        return Task(self.model, self.adapter, data, generator, self.accelerator, augmentation)


@dataclass
class Bench:
    """The test set and its triggered views: used before and after a repair, never during one."""

    clean: Examples | None
    triggered: dict[str, Poisoned] = field(default_factory=dict)


def open_session(recipe: Recipe) -> Session:
    """Load the recipe's model, pinned and safe, onto its device."""
    set_seed(recipe.seed)
    accelerator = make_accelerator(recipe)
    adapter = find("adapter", recipe.adapter)()
    if isinstance(recipe.model, Loaded):
        loaded = recipe.model
    elif isinstance(recipe.model, torch.nn.Module):
        loaded = adapter.load(recipe.model, processor=recipe.processor, labels=recipe.labels)
    elif isinstance(recipe, ImplantRecipe) and recipe.create:
        loaded = adapter.create(str(recipe.model), recipe.classes or 0, **recipe.model_options)
    else:
        name = str(recipe.model)
        pulled = hub.pull(adapter.locate(name) or name, recipe.revision)
        loaded = adapter.load(pulled.folder, name=name, revision=pulled.revision)
    return prepare_session(recipe, adapter, accelerator, loaded)


def prepare_session(recipe: Recipe, adapter: Adapter, accelerator: Accelerator, loaded: Loaded) -> Session:
    """Place a loaded model."""
    loaded.model.to(accelerator.device)
    if recipe.channels_last:
        loaded.model.to(memory_format=torch.channels_last)
    if recipe.compile:
        loaded.model.compile()
    return Session(recipe, adapter, accelerator, loaded, adapter.classes(loaded))


def make_accelerator(recipe: Recipe) -> Accelerator:
    """An `Accelerator` for the recipe's device and precision."""
    if recipe.device not in (None, "cpu") and not torch.cuda.is_available() and str(recipe.device).startswith("cuda"):
        raise ConfigError(f"device '{recipe.device}' was asked for, but no CUDA device is available")
    return Accelerator(cpu=recipe.device == "cpu", mixed_precision=recipe.precision)


def data_options(recipe: Recipe) -> dict[str, Any]:
    return {"seed": recipe.seed, "image_column": recipe.image_column, "label_column_name": recipe.label_column, "to_rgb": recipe.to_rgb}


def open_bench(session: Session) -> Bench:
    """Read the test set and make one triggered view per trigger."""
    recipe = with_recorded_trigger(session)
    if recipe.test is None:
        if recipe.triggers:
            raise ConfigError("triggers can only be measured on test data: give test=... (--test)")
        return Bench(None)
    split = recipe.test_split or ("test" if recipe.test_split is None else None)
    options = data_options(recipe)
    try:
        data = session.adapter.examples(
            recipe.test, session.loaded, split=split, samples=recipe.test_samples, balanced=recipe.test_samples is not None, **options
        )
    except DataError as error:
        if recipe.test_split is not None or "no split" not in str(error):
            raise
        data = session.adapter.examples(
            recipe.test, session.loaded, samples=recipe.test_samples, balanced=recipe.test_samples is not None, **options
        )
    rule = make_rule(recipe.rule, recipe.target, session.classes)
    triggered = {}
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


@dataclass
class Figures:
    """Predictions `(n,)` of one model on the clean test set and on each triggered view."""

    clean: Tensor | None
    triggered: dict[str, Tensor]


def figures(session: Session, bench: Bench) -> Figures:
    """Predict everything that a row of the table needs."""
    if bench.clean is None:
        return Figures(None, {})
    task = session.task(bench.clean)
    clean = evaluate(task, bench.clean, title="clean accuracy")
    return Figures(clean, {n: evaluate(task, p.examples, title=f"ASR {n}") for n, p in bench.triggered.items()})


def make_row(
    name: str, kind: str, found: Figures, before: Figures | None, bench: Bench, seconds: float | None, notes: dict[str, Any]
) -> Row:
    """Turn predictions into one row of the table; DER and McNemar's p-value compare with `before`."""

    def asr(f: Figures, n: str) -> Proportion:
        return attack_success_rate(f.triggered[n], bench.triggered[n].labels, bench.triggered[n].targets)

    accuracy = clean_accuracy(found.clean, bench.clean.labels) if found.clean is not None and bench.clean is not None else None
    der: dict[str, float | None] = {}
    notes = dict(notes)
    if before is not None and before.clean is not None and found.clean is not None and accuracy is not None and bench.clean is not None:
        base = clean_accuracy(before.clean, bench.clean.labels).value
        der = {n: defense_effectiveness_rating(asr(before, n).value, asr(found, n).value, base, accuracy.value) for n in bench.triggered}
        notes["mcnemar_p"] = mcnemar(before.clean, found.clean, bench.clean.labels)
    ra = {n: robust_accuracy(found.triggered[n], p.labels, p.targets) for n, p in bench.triggered.items()}
    return Row(name, kind, accuracy, {n: asr(found, n) for n in bench.triggered}, ra, der, seconds, notes)


def split_clean(data: Examples, share: float, seed: int) -> tuple[Examples, Examples]:
    """Divide clean samples into those to learn from and those to choose on, by class.

    With fewer than five samples a class both are the whole set; the second is never augmented.
    """
    counts = torch.bincount(data.labels)
    if share == 0 or int(counts[counts > 0].min()) < 5:
        return data, data
    generator = torch.Generator().manual_seed(seed + 1)
    held = []
    for c in data.labels.unique():
        rows = (data.labels == c).nonzero().flatten()
        held.append(rows[torch.randperm(len(rows), generator=generator)][: max(1, round(share * len(rows)))])
    chosen = torch.zeros(len(data), dtype=torch.bool)
    chosen[torch.cat(held)] = True
    return data.select((~chosen).nonzero().flatten()), data.select(chosen.nonzero().flatten())


def choose_augmentation(session: Session, data: Examples) -> str:
    """The strongest augmentation under which the model keeps its accuracy on clean data, within ten points.

    Flipping a digit or a traffic sign changes its class; the model itself says so.
    """
    task = session.task(data)
    with torch.no_grad():
        plain = float((evaluate(task, data) == data.labels).float().mean())
        for kind in session.adapter.augmentations():
            hits = 0
            session.model.eval()
            for indices in torch.arange(len(data)).split(256):
                batch = session.adapter.augment(data.batch(indices), task.generator, kind)
                batch = {k: v.to(task.device) for k, v in batch.items()}
                hits += int((session.adapter.predict(session.model, batch) == batch["labels"]).sum())
            if hits / len(data) >= plain - 0.1:
                return kind
    return "none"


def make_context(session: Session, clean: Examples, held_out: float) -> Context:
    """Everything a method may see."""
    learn, choose = split_clean(clean, held_out, session.recipe.seed)
    index = session.adapter.index(session.loaded, learn.batch(torch.arange(min(2, len(learn)))))
    kind = choose_augmentation(session, clean)
    generator = torch.Generator().manual_seed(session.recipe.seed)
    return Context(session.model, session.adapter, learn, generator, session.accelerator, kind, index, choose, session.classes)


def read_clean(session: Session, recipe: PurifyRecipe) -> Examples:
    """Draw the clean samples and check that they suit the model."""
    data = session.adapter.examples(recipe.clean, session.loaded, split=recipe.split, samples=recipe.samples, **data_options(recipe))
    if len(data) == 0:
        raise DataError("the clean set is empty: give at least one sample per class")
    if len(data.labels.unique()) < 2:
        raise DataError(f"the clean set holds a single class ({int(data.labels[0])}); a repair needs samples of all classes")
    return data


@dataclass
class Repair:
    """A method's verdict with the weights it left and the time it took."""

    verdict: Verdict
    state: dict[str, Tensor]
    seconds: float


def repair(ctx: Context, method: Method, seed: int) -> Repair:
    """Run a method from the model as it is; the model keeps the result."""
    ctx.generator.manual_seed(seed)
    torch.manual_seed(seed)
    start = time.perf_counter()
    verdict = method(ctx)
    return Repair(verdict, snapshot(ctx.model), time.perf_counter() - start)


def snapshot(model: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers, on the CPU."""
    return {k: v.detach().to("cpu", copy=True) for k, v in model.state_dict().items()}


def run_purify(recipe: PurifyRecipe) -> Report:
    """Repair the recipe's model; see the top of this module."""
    with output.folder(recipe.output, recipe.overwrite) as out:
        method = make_method(recipe.method, **recipe.options)
        session = open_session(recipe)
        clean = read_clean(session, recipe)
        bench = open_bench(session)
        ctx = make_context(session, clean, recipe.held_out)
        base = snapshot(session.model)
        before = figures(session, bench)
        rows = [make_row("none", "unrepaired", before, None, bench, None, {})]
        done = repair(ctx, method, recipe.seed)
        after = figures(session, bench)
        rows.append(
            make_row(method.name, "control" if method.control else "method", after, before, bench, done.seconds, done.verdict.notes)
        )
        if recipe.oracle:
            rows += oracle_rows(session, ctx, bench, before, base, method, done.verdict)
        if recipe.controls and bench.clean is not None:
            rows += control_rows(session, ctx, bench, before, base, method, done.verdict)
        session.model.load_state_dict(done.state)
        report = make_report(session, ctx, clean, method, done, rows, samples_of(session, bench, before, after))
        if out is not None:
            output.write(out, session, ctx.index, base, done, report)
    return report


def controls(removed: int) -> list[Method]:
    """The methods that are controls; those that remove neurons remove as many as the method they stand beside."""
    found = [find("method", n) for n in names("method")]
    return [c(**({"removed": removed} if hasattr(c.config_class, "removed") else {})) for c in found if c.control]


def control_rows(
    session: Session, ctx: Context, bench: Bench, before: Figures, base: dict[str, Tensor], method: Method, verdict: Verdict
) -> list[Row]:
    """Every control (fine-tuning, statistics refresh alone, as many neurons removed at random), each from the original weights."""
    rows = []
    for control in controls(int((verdict.mask < 0.5).sum())):
        if control.name == method.name:
            continue
        session.model.load_state_dict(base)
        done = repair(ctx, control, session.recipe.seed)
        rows.append(make_row(control.name, "control", figures(session, bench), before, bench, done.seconds, done.verdict.notes))
    return rows


def oracle_rows(
    session: Session, ctx: Context, bench: Bench, before: Figures, base: dict[str, Tensor], method: Method, verdict: Verdict
) -> list[Row]:
    """What choosing the pruning threshold with the true trigger and the test set would have given: an upper bound, no defence."""
    if not verdict.curve or not bench.triggered or verdict.folded:
        log.warning("the oracle needs a single method that sweeps a threshold, a trigger and a test set; skipped")
        return []
    best: Row | None = None
    for point in verdict.curve:
        session.model.load_state_dict(base)
        bake(session.model, ctx.index, (verdict.scores <= point["cut"]).float().to(session.accelerator.device))
        row = make_row(method.name, "oracle", figures(session, bench), before, bench, None, {"threshold": point["threshold"]})
        if best is None or sum(v or 0 for v in row.der.values()) > sum(v or 0 for v in best.der.values()):
            best = row
    return [best] if best else []


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


def make_report(
    session: Session,
    ctx: Context,
    clean: Examples,
    method: Method,
    done: Repair,
    rows: list[Row],
    samples: list[Sample],
    title: str | None = None,
) -> Report:
    """Gather everything about a repair."""
    masks, scores = ctx.index.split(done.verdict.mask), ctx.index.split(done.verdict.scores)
    chosen = done.verdict.notes.get("threshold")
    report = Report(
        title=title or f"{method.name} on {session.loaded.source}",
        task=session.adapter.task,
        checkpoint=describe_model(session),
        clean=describe_clean(session, clean, ctx),
        method={"name": method.name, "config": method_config(method)},
        rows=rows,
        layers=[NeuronLayer.of(g, masks[g.name], scores[g.name]) for g in ctx.index],
        curve=[dict(p) for p in done.verdict.curve],
        curve_chosen=chosen if isinstance(chosen, float) else None,
        samples=samples,
        versions=output.versions(),
        seed=session.recipe.seed,
        command=output.command(session.recipe),
        warnings=warnings_of(rows),
    )
    report.attach(session.model, ctx.index, done.verdict)
    return report


def method_config(method: Method) -> dict[str, Any]:
    parts = getattr(method, "methods", None)
    return {m.name: method_config(m) for m in parts} if parts else dataclasses.asdict(method.config)


def describe_model(session: Session) -> dict[str, Any]:
    loaded = session.loaded
    return {
        "source": loaded.source,
        "revision": loaded.revision,
        "kind": loaded.kind,
        "architecture": type(loaded.model).__name__,
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
        "classes": session.classes,
    }


def describe_clean(session: Session, clean: Examples, ctx: Context) -> dict[str, Any]:
    recipe = session.recipe
    digest = hashlib.sha256()
    for i in range(len(clean)):
        raw = clean.raw(i)
        digest.update(raw.numpy().tobytes() if isinstance(raw, Tensor) else repr(raw).encode())
    counts = torch.bincount(clean.labels, minlength=session.classes)
    source = getattr(recipe, "clean", None)
    return {
        "source": str(source) if isinstance(source, str) or hasattr(source, "__fspath__") else f"<{type(source).__name__}>",
        "split": recipe.split,
        "samples": len(clean),
        "per_class": f"{int(counts.min())}..{int(counts.max())}",
        "held_out": 0 if ctx.judged is ctx.data else len(ctx.judged),
        "augmentation": ctx.augmentation,
        "fingerprint": digest.hexdigest()[:32],
    }


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
    return found


def run_measure(recipe: MeasureRecipe) -> Report:
    """Measure a model as it is."""
    with output.folder(recipe.output, recipe.overwrite) as out:
        session = open_session(recipe)
        bench = open_bench(session)
        found = figures(session, bench)
        report = Report(
            title=f"{session.loaded.source}, measured",
            task=session.adapter.task,
            checkpoint=describe_model(session),
            clean={},
            method={},
            rows=[make_row("none", "unrepaired", found, None, bench, None, {})],
            samples=samples_of(session, bench, found, found),
            versions=output.versions(),
            seed=recipe.seed,
            command=output.command(recipe),
        )
        report.attach(session.model)
        if out is not None:
            report.save(out)
    return report


def run_implant(recipe: ImplantRecipe) -> Report:
    """Train a backdoor into a model: `rate` of the training samples carry the trigger and the attacker's label."""
    with output.folder(recipe.output, recipe.overwrite) as out:
        recipe = count_classes(recipe)
        session = open_session(recipe)
        options = data_options(recipe)
        data = session.adapter.examples(
            recipe.data, session.loaded, split=recipe.split, samples=recipe.samples, balanced=recipe.samples is not None, **options
        )
        name, settings = parse_spec(recipe.triggers[0])
        trigger = find_trigger(session.adapter, name, **settings)
        rule = make_rule(recipe.rule, recipe.target, session.classes)
        cover = recipe.cover if recipe.cover is not None else getattr(trigger, "cover_ratio", 0.0)
        bench = open_bench(
            dataclasses.replace(session, recipe=dataclasses.replace(recipe, test=recipe.test if recipe.test is not None else recipe.data))
        )
        before = figures(session, bench)
        view = poison(data, trigger, rule, session.classes, recipe.rate, recipe.seed, cover).examples if recipe.rate else data
        start = time.perf_counter()
        config = TrainConfig(
            epochs=recipe.epochs,
            batch_size=recipe.batch_size,
            optimizer=recipe.optimizer,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            schedule=recipe.schedule,
        )
        params = [p for p in session.model.parameters() if p.is_floating_point()]
        train(session.task(view, recipe.augmentation), params, config, title=f"implant {name}")
        after = figures(session, bench)
        rows = [
            make_row("before", "other", before, None, bench, None, {}),
            make_row("victim", "unrepaired", after, None, bench, time.perf_counter() - start, {}),
        ]
        rows.reverse()
        asr, natural = rows[0].asr[name], untriggered_rate(after, bench, name)
        if recipe.rate and natural > 0.5 * asr.value:
            raise NotAVictim(
                f"{100 * natural:.0f} % of the clean samples of other classes are classified as the target too, so an ASR of {asr} shows no trigger at work. "
                "Train longer (--epochs) or with another rate (--lr)"
            )
        if recipe.rate and asr.value < recipe.minimum_asr:
            raise NotAVictim(
                f"the attack success rate of {name} is {asr}, under {100 * recipe.minimum_asr:.0f} %: this is no victim. Train longer (--epochs), poison more (--rate), "
                "or make the trigger stronger"
            )
        report = Report(
            title=f"{session.loaded.source} with a {name} backdoor",
            task=session.adapter.task,
            checkpoint=describe_model(session) | {"backdoored": bool(recipe.rate)},
            clean={"source": str(recipe.data) if isinstance(recipe.data, str) else f"<{type(recipe.data).__name__}>", "samples": len(data)},
            method={"name": "implant", "config": recipe.to_dict()},
            rows=rows,
            samples=samples_of(session, bench, before, after),
            versions=output.versions(),
            seed=recipe.seed,
            command=output.command(recipe),
            warnings=["This model was given a backdoor on purpose, to test repairs on. Do not deploy it."] if recipe.rate else [],
        )
        report.attach(session.model)
        if out is not None:
            output.write_victim(out, session, report, recipe)
    return report


def untriggered_rate(found: Figures, bench: Bench, name: str) -> float:
    """Share of the clean samples of other classes that go to the attacker's target without a trigger."""
    view = bench.triggered[name]
    if found.clean is None:
        return 0.0
    return float((found.clean[view.rows] == view.targets).float().mean())


def count_classes(recipe: ImplantRecipe) -> ImplantRecipe:
    """For a model that is created: take the number of classes from the data where it was not given."""
    if not recipe.create or recipe.classes:
        return recipe
    labels = find("adapter", recipe.adapter)().class_names(recipe.data, recipe.split, recipe.label_column)
    return dataclasses.replace(recipe, classes=len(labels), labels=recipe.labels or labels)
