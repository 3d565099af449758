"""What surrounds every command and script: errors and signals as exit codes, quiet libraries, and the report on the terminal."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from hf_purify.cli.shield import defect, say, shield_logs
from hf_purify.errors import PurifyError
from hf_purify.recipe import ImplantRecipe, MeasureRecipe, PurifyRecipe, Recipe
from hf_purify.redaction import lines, one_line

if TYPE_CHECKING:
    from hf_purify.estimate import Estimate
    from hf_purify.report import Report

JOBS: dict[str, type[Recipe]] = {"purify": PurifyRecipe, "implant": ImplantRecipe, "measure": MeasureRecipe}


def run_job(job: str, preset: Path | None, settings: dict[str, Any], as_json: bool) -> None:
    """Build a job's recipe, from a file if there is one, run it, and show its report."""
    quiet(as_json)
    import hf_purify.purifier as purifier

    recipe = JOBS[job].read(preset, **settings) if preset else JOBS[job].make(**settings)
    show_report(getattr(purifier, f"run_{job}")(recipe), recipe.output, as_json)


@contextmanager
def errors() -> Iterator[None]:
    """Deliberate errors become one line on stderr and their exit code; Ctrl-C becomes 130, SIGTERM 143, and a defect its traceback and 1."""
    shield_logs()
    before = signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        yield
    except PurifyError as error:
        say(_said(f"error: {error}", error), "red")
        raise typer.Exit(error.exit_code) from None
    except (KeyboardInterrupt, Terminated) as reason:
        say(_said("interrupted; nothing was left half-written", reason), "yellow")
        raise typer.Exit(130 if isinstance(reason, KeyboardInterrupt) else 143) from None
    except (typer.Exit, typer.Abort, BrokenPipeError):
        raise
    except Exception as error:
        typer.echo(_speaker() + defect(error), err=True)
        raise typer.Exit(1) from None
    finally:
        signal.signal(signal.SIGTERM, before)


class Terminated(BaseException):
    """SIGTERM, as from a scheduler or a launcher: raised so that what was begun is put away."""


def _raise_terminated(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once: a second one must not end the putting away
    raise Terminated


def _said(text: str, reason: BaseException) -> str:
    """A message with who speaks, where there are several processes, and with what was noted on the way."""
    return _speaker() + "; ".join([text, *getattr(reason, "__notes__", [])])


def _speaker() -> str:
    """Which process speaks, where there are several."""
    world, rank = (os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK"))
    return f"[process {rank} of {world}] " if world not in ("", "1") else ""


def quiet(as_json: bool) -> None:
    """Keep other libraries' notes off the terminal; with `--json`, their progress bars too."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("hf_purify").setLevel(logging.INFO)
    if not logging.getLogger().handlers:
        logging.basicConfig(level=logging.WARNING, format=f"{_speaker()}%(message)s")
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    if datasets := sys.modules.get("datasets"):  # which has read its environment, and else is left out where nothing needs it
        datasets.disable_progress_bars()
    if as_json:
        os.environ["TQDM_DISABLE"] = "1"


def show_report(report: Report, output: str | None, as_json: bool) -> None:
    from hf_purify.output import process

    if process() != 0:
        return
    if as_json:
        typer.echo(report.to_json())
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(report.table())
    for warning in report.warnings:
        console.print(Text.assemble(("warning:", "yellow"), " ", lines(warning, indent="  ")), highlight=False)
    if output:
        console.print(Text.assemble("written to ", (one_line(output), "bold"), " (start with report.html)"), highlight=False)


def show_estimate(found: Estimate) -> None:
    """Two lines on model and repair, and a row for each number of processes, in GiB."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    plan, parts = found.plan, ("weights", "gathered", "gradients", "optimizer", "kept", "passing", "total")
    learns = f"a mask over {found.neurons:,} neurons" if found.neurons else "all weights"
    table = Table("processes", "layers run again", *parts, "PFLOP a step", *(["hours"] if plan.tflops else []), show_edge=False)
    for column in table.columns:
        column.justify = "right"
    for row in found.rows:
        sizes = [f"{getattr(row.memory, part) / 2**30:.1f}" for part in parts]
        hours = [f"{row.seconds / 3600:.2f}"] if row.seconds is not None else []
        table.add_row(str(row.processes), "yes" if row.checkpointing else "no", *sizes, f"{row.flops / 1e15:.4g}", *hours)
    console = Console(width=None if sys.stdout.isatty() else 160)
    told = (
        f", {found.parameters:,} parameters in {found.dtype}\n"
        f"{plan.method} learns {learns}: {found.steps:,} steps of {found.batch_size} samples of {found.sample}, "
        f"each {found.forward / 1e15:.4g} PFLOP forward and {found.backward / 1e15:.4g} backward"
    )
    console.print(Text.assemble((one_line(found.architecture), "bold"), lines(told)), highlight=False)
    console.print(table)
    console.print("GiB and operations of each process, predicted from the config; with several processes under FSDP2", highlight=False)
