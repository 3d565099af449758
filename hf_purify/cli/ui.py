"""The command that serves the page in the browser."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Annotated

import typer

from hf_purify.cli.terminal import errors, quiet
from hf_purify.redaction import one_line

app = typer.Typer()


@app.command()
def ui(
    port: Annotated[
        int | None, typer.Option("--port", min=1, max=65535, help="Of the page; the first free one from 7860 on if not given.")
    ] = None,
    folder: Annotated[Path, typer.Option("--folder", help="Work folder: each run writes a folder below it.")] = Path("hf-purify-ui"),
    browser: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Serve a page on this machine alone: scan, repair, compare and download in the browser.

    `hf-purify ui --open`
    """
    with errors():
        quiet(False)
        from hf_purify.ui import serve

        with serve(folder, port, browser=browser) as address:
            typer.echo(f"hf-purify is at {address} and writes below {one_line(str(folder))}; Ctrl-C ends it, and all runs with it")
            threading.Event().wait()
