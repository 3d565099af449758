"""The command that tells whether a model has a backdoor."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_purify.cli.options import given_settings, with_shared
from hf_purify.cli.terminal import errors, quiet
from hf_purify.errors import ConfigError
from hf_purify.redaction import lines, one_line

if TYPE_CHECKING:
    from hf_purify.diagnosis import Diagnosis

app = typer.Typer(no_args_is_help=True)
SUSPICIOUS = 3  # exit code


@app.command()
@with_shared("test_split", "test_samples", "gradient_checkpointing", "accumulate", "checkpoint_every")
def scan(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="Checkpoint folder, Hub id, timm name, or hf-hub: id.")] = None,
    clean: Annotated[str | None, typer.Option("--clean", help="Clean data: data set id, folder of images, or Parquet file.")] = None,
    samples: Annotated[int, typer.Option("--samples", "-n", help="Clean samples to draw, class-balanced.")] = 500,
    held_out: Annotated[float, typer.Option("--held-out", help="Share of them that recovered triggers are judged on.")] = 0.2,
    suspects: Annotated[str | None, typer.Option("--suspects", help="Samples to rank by suspicion, read like the clean data.")] = None,
    suspects_split: Annotated[str | None, typer.Option("--suspects-split", help="Split of the suspects.")] = None,
    poisoned: Annotated[
        str | None, typer.Option("--poisoned", help="Column of the suspects that says which carry a trigger, where that is known.")
    ] = None,
    threshold: Annotated[
        float, typer.Option("--threshold", help="Score above which a model is suspicious: 0.9 takes one clean model in ten for bad.")
    ] = 0.9,
    trigger_steps: Annotated[int, typer.Option("--trigger-steps", help="Steps to sharpen the trigger of a suspected class.")] = 15,
    as_sarif: Annotated[bool, typer.Option("--sarif", help="Print SARIF 2.1.0 and nothing else, for code scanning.")] = False,
    **shared: Any,
) -> None:
    """Tell whether a checkpoint has a backdoor, and where. Exit code 0: none was found; 3: it is suspicious.

    `hf-purify scan MODEL --clean DATA -o scanned`
    """
    arguments = locals()
    options = arguments.pop("shared")
    file, as_json = options.pop("recipe"), options.pop("as_json")
    arguments.pop("as_sarif")
    with errors():
        if as_json and as_sarif:
            raise ConfigError("--json and --sarif both take the terminal for themselves: choose one; -o writes the JSON as well")
        if run_scan_job(file, given_settings(context, arguments | options), as_json, as_sarif):
            raise typer.Exit(SUSPICIOUS)


def run_scan_job(preset: Path | None, settings: dict[str, Any], as_json: bool, as_sarif: bool = False) -> bool:
    """Scan as a recipe's file, if there is one, and settings say, and show what was found; whether the model is suspicious."""
    from hf_purify.recipe import ScanRecipe
    from hf_purify.scanner import run_scan

    quiet(as_json or as_sarif)
    recipe = ScanRecipe.read(preset, **settings) if preset else ScanRecipe.make(**settings)
    found = run_scan(recipe)
    show_diagnosis(found, recipe.output, as_json, as_sarif)
    return found.suspicious


def show_diagnosis(found: Diagnosis, output: str | None, as_json: bool, as_sarif: bool) -> None:
    """Print what was found, on the main process alone."""
    from hf_purify.output import process

    if process() != 0:
        return
    if as_json or as_sarif:
        typer.echo(found.to_sarif() if as_sarif else found.to_json(), nl=False)
        return
    from rich.console import Console
    from rich.text import Text

    from hf_purify.findings import terminal

    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(terminal(found))
    for warning in found.warnings:
        console.print(Text.assemble(("warning:", "yellow"), " ", lines(warning, indent="  ")), highlight=False)
    if output:
        console.print(Text.assemble("written to ", (one_line(output), "bold"), " (start with report.html)"), highlight=False)
