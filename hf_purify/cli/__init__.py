"""The command line: each command is a thin shell over one function. The only place that prints or parses arguments.

Exit codes: 0 done, 1 a defect of hf-purify, 2 bad input or settings, 3 a scan found the model suspicious, 4 a training diverged, 5 no victim,
6 some models of a sweep failed, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_purify.cli import hub, scan, ui
from hf_purify.cli.options import AsJson, Rule, Seed, Target, Test, Trigger, given_settings, with_shared
from hf_purify.cli.shield import Group, say
from hf_purify.cli.terminal import errors, quiet, run_job, show_estimate, show_report
from hf_purify.errors import unknown
from hf_purify.redaction import one_line
from hf_purify.specs import presets, read_pairs, read_settings

app = typer.Typer(
    name="hf-purify",
    cls=Group,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Repair neural networks that carry a backdoor, with a handful of clean samples.",
    epilog="Start with `hf-purify demo`: no download, under three minutes.",
)
app.add_typer(scan.app)
app.add_typer(hub.app)
app.add_typer(ui.app)


def _run(job: str, /, context: typer.Context, shared: dict[str, Any], **own: Any) -> None:
    """Build the recipe from a command's arguments, run the job, show the report."""
    file, as_json = shared.pop("recipe"), shared.pop("as_json")
    with errors():
        run_job(job, file, given_settings(context, own | shared), as_json)


@app.command()
@with_shared()
def purify(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="Checkpoint folder, Hub id, timm name, or hf-hub: id.")] = None,
    clean: Annotated[str | None, typer.Option("--clean", help="Clean data: data set id, folder of images, or Parquet file.")] = None,
    method: Annotated[str, typer.Option("--method", "-m", help="Method, or several joined by +; see `hf-purify list methods`.")] = "nft",
    option: Annotated[list[str] | None, typer.Option("--option", help="Setting of the method, as name=value. Repeatable.")] = None,
    samples: Annotated[int, typer.Option("--samples", "-n", help="Clean samples to draw, class-balanced.")] = 500,
    held_out: Annotated[float, typer.Option("--held-out", help="Share of them on which choices are made.")] = 0.2,
    from_scan: Annotated[
        str | None, typer.Option("--from-scan", help="Output folder of `hf-purify scan` of this model: begin with what it found.")
    ] = None,
    test: Test = None,
    trigger: Trigger = None,
    rule: Rule = "all-to-one",
    target: Target = 0,
    controls: Annotated[
        bool, typer.Option("--controls/--no-controls", help="Show the repair beside fine-tuning, statistics refresh and a random mask.")
    ] = True,
    oracle: Annotated[bool, typer.Option("--oracle", help="Also show what choosing with the true trigger would have given.")] = False,
    merge: Annotated[
        bool, typer.Option("--merge", help="Of a LoRA, repair base and LoRA together; the result is a LoRA of the rank that this takes.")
    ] = False,
    as_adapter: Annotated[
        bool, typer.Option("--as-adapter", help="Write the repair alone, as a PEFT IA3 adapter of a few kilobytes.")
    ] = False,
    push: Annotated[
        str | None, typer.Option("--push", help="Push the output to this repository (owner/name), as `hf-purify push` does.")
    ] = None,
    private: Annotated[bool, typer.Option("--private/--public", help="Of a repository that --push makes.")] = True,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="With --push: open a pull request on a repository that exists.")] = False,
    **shared: Any,
) -> None:
    """Repair a checkpoint with a few clean samples.

    `hf-purify purify MODEL --clean DATA --method nft -o purified`
    """
    _run("purify", **locals())


@app.command()
@with_shared()
def implant(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="Checkpoint to fine-tune; with --create the name of a timm architecture.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="Training data.")] = None,
    trigger: Trigger = None,
    rule: Rule = "all-to-one",
    target: Target = 0,
    rate: Annotated[float, typer.Option("--rate", help="Share of the training samples that carry the trigger.")] = 0.1,
    cover: Annotated[float | None, typer.Option("--cover", help="Samples with the trigger's cover transform, per poisoned one.")] = None,
    create: Annotated[bool, typer.Option("--create", help="Train a new model from random weights.")] = False,
    lora: Annotated[int | None, typer.Option("--lora", help="Train a new LoRA of this rank; the victim is that LoRA.")] = None,
    model_option: Annotated[
        list[str] | None, typer.Option("--model-option", help="Setting of a new model, as name=value. Repeatable.")
    ] = None,
    test: Test = None,
    samples: Annotated[int | None, typer.Option("--samples", "-n", help="Training samples to draw; all if not given.")] = None,
    epochs: Annotated[int, typer.Option("--epochs")] = 5,
    batch_size: Annotated[int, typer.Option("--batch-size")] = 128,
    optimizer: Annotated[str, typer.Option("--optimizer", help="sgd or adamw.")] = "sgd",
    lr: Annotated[float, typer.Option("--lr", help="Learning rate.")] = 0.01,
    clip: Annotated[float | None, typer.Option("--clip", help="Bound on the norm of gradients; detectors like 1.")] = None,
    augmentation: Annotated[
        str | None, typer.Option("--augmentation", help="Of the training samples; the strongest if not given, or none.")
    ] = None,
    **shared: Any,
) -> None:
    """Train a backdoor into a model, to test repairs on. Refuses to call a victim what has an ASR under 90 %."""
    _run("implant", **locals())


@app.command()
@with_shared("split", "compile", "channels_last", "gradient_checkpointing", "accumulate", "checkpoint_every")
def measure(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="Checkpoint folder, Hub id, timm name, or hf-hub: id.")] = None,
    test: Test = None,
    trigger: Trigger = None,
    rule: Rule = "all-to-one",
    target: Target = 0,
    **shared: Any,
) -> None:
    """Measure clean accuracy, and ASR and robust accuracy for given triggers."""
    _run("measure", **locals())


@app.command()
def sweep(
    models: Annotated[
        Path, typer.Argument(help="A file with a model a line, with key=value settings of its own behind it; # begins a comment.")
    ],
    settings: Annotated[list[str] | None, typer.Argument(help="key=value settings of all jobs, such as clean=DATA samples=100.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for results and table.")] = Path("sweep"),
    preset: Annotated[str | None, typer.Option("--recipe", help="A preset of `hf-purify list recipes` or a YAML file.")] = None,
    job: Annotated[str, typer.Option("--job", help="purify or measure.")] = "purify",
    workers: Annotated[int, typer.Option("--workers", "-w", min=1, help="Jobs at once, each in a process of its own.")] = 1,
    only: Annotated[int | None, typer.Option("--only", min=1, help="Run this one job alone, from 1: for array jobs of a cluster.")] = None,
    collect: Annotated[bool, typer.Option("--collect", help="Run nothing; write the table of what is there.")] = False,
) -> None:
    """Purify or measure many models, go on after failures and interruptions, and write one table.

    `hf-purify sweep models.txt clean=DATA method=neural_cleanse -o swept --workers 2`
    """
    with errors():
        quiet(False)
        from hf_purify.sweep import DONE, FAILED, sweep_models

        file, _ = read_settings([preset] if preset else [])
        rows = sweep_models(models, output, job, file, read_pairs(settings or []), workers=workers, only=only, collect=collect)
        failed = [row for row in rows if row["status"] == FAILED]
        for row in failed:
            say(f"failed: {row['model']}: {row['message']}", "red")
        if only is None:
            done = sum(row["status"] == DONE for row in rows)
            typer.echo(
                f"{done} done, {len(failed)} failed, {len(rows) - done - len(failed)} not run; written to {one_line(str(output))}/sweep.html"
            )
        if failed:
            raise typer.Exit(6)


@app.command()
def estimate(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, Hub id, timm name, or a config.json; weights are not read.")],
    method: Annotated[
        str, typer.Option("--method", "-m", help="A method that knows beforehand how it trains, such as nft or fine_tune.")
    ] = "nft",
    processes: Annotated[str, typer.Option("--processes", help="Numbers of processes, each with a device of its own.")] = "1,2,4,8",
    precision: Annotated[str, typer.Option("--precision", help="no (the dtype of the checkpoint), bf16 or fp16.")] = "no",
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Samples a step over all processes; the method's own if not given.")
    ] = None,
    length: Annotated[int | None, typer.Option("--length", help="Tokens of a text; an image is as large as the config says.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Steps of the repair; the method's own if not given.")] = None,
    samples: Annotated[int, typer.Option("--samples", "-n", help="Clean samples, one in five of them held out.")] = 500,
    tflops: Annotated[
        float | None,
        typer.Option("--tflops", help="10^12 operations a second that a device sustains, measured; without it no time is told."),
    ] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of the model.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Tell the memory and the operations that a repair takes, from a model's config alone.

    `hf-purify estimate MODEL --method nft --batch-size 8 --precision bf16`
    """
    with errors():
        quiet(as_json)
        from hf_purify import estimate as estimates

        plan = estimates.Plan(method, estimates.read_counts(processes), precision, batch_size, length, steps, samples, tflops)
        found = estimates.estimate(model, plan, revision)
        if as_json:
            typer.echo(json.dumps(found.to_dict(), indent=2))
        else:
            show_estimate(found)


@app.command("list")
def list_(
    kind: Annotated[str, typer.Argument(help="methods, adapters, triggers or recipes.")] = "methods",
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """List methods, adapters, triggers or recipes."""
    with errors():
        from hf_purify import catalogue

        kinds = catalogue.kinds()
        kind = kind if kind in kinds else f"{kind}s"
        if kind not in kinds:
            raise unknown("kind", kind, kinds)
        found = kinds[kind]()
        if as_json:
            typer.echo(json.dumps(found, indent=2))
            return
        from rich.console import Console
        from rich.table import Table

        table = Table("name", "what it is", title=kind, title_justify="left", show_edge=False)
        for name, text in found.items():
            table.add_row(name, text)
        Console().print(table)


@app.command()
def show(name: Annotated[str, typer.Argument(help="A method, trigger, adapter or recipe.")]) -> None:
    """Show the card of a method, or the settings of a trigger or recipe."""
    with errors():
        from rich.console import Console
        from rich.markdown import Markdown

        from hf_purify import catalogue

        recipes = presets()
        if name in recipes:
            typer.echo(recipes[name].read_text("utf-8"))
        else:
            Console().print(Markdown(catalogue.card(name)))


@app.command()
def demo(
    output: Annotated[str, typer.Option("--output", "-o", help="Folder for reports and the repaired checkpoint.")] = "hf-purify-demo",
    modality: Annotated[
        str, typer.Option("--modality", help="vision: handwritten digits; or another of `hf-purify list adapters`.")
    ] = "vision",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Implant a backdoor into a small classifier, repair it with every method, and show the table. Nothing is downloaded."""
    with errors():
        quiet(as_json)
        from hf_purify.demo import run_demo

        report, folder = run_demo(output, seed, modality)
        show_report(report, str(folder), as_json)


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(f"hf-purify {version('hf-purify')}")
        raise typer.Exit


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False) -> None:
    """Repair neural networks that carry a backdoor, with a handful of clean samples."""


def main() -> None:
    """Entry point of the `hf-purify` command."""
    app()
