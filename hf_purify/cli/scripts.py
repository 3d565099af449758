"""Jobs as `accelerate launch` runs them: scripts with a preset and `key=value` settings for arguments."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from hf_purify.cli.scan import run_scan_job
from hf_purify.cli.shield import Command
from hf_purify.cli.terminal import errors, quiet, run_job
from hf_purify.specs import read_settings


def run_script(job: str, arguments: list[str]) -> None:
    """A job as `accelerate launch` runs it, from a preset and `key=value` settings; ends the process.

    Args:
        job: `purify`, `implant`, `measure` or `scan`.
        arguments: a YAML recipe or the name of a preset, if any, then settings; `options.lr=0.1` is one of the method's.
    """

    def command(
        settings: Annotated[
            list[str],
            typer.Argument(
                help="A preset of `hf-purify list recipes` or a YAML file, then key=value settings of the recipe, such as seed=1 or options.lr=0.1."
            ),
        ],
        as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON and nothing else.")] = False,
    ) -> None:
        with errors():
            preset, given = read_settings(settings)
            if job == "scan":
                run_scan_job(preset, given, as_json)
            else:
                run_job(job, preset, given, as_json)

    command.__doc__ = f"Run one {job} job on any number of processes: accelerate launch -m hf_purify_recipes.{job} PRESET key=value ..."
    script = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
    script.command(cls=Command)(command)
    script(arguments)


def run_guarded(job: Callable[[], None]) -> None:
    """Run a script's job; deliberate errors end the process as those of a command do."""
    try:
        with errors():
            quiet(False)
            job()
    except typer.Exit as end:
        sys.exit(end.exit_code)
