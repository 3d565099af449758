"""A page in the browser: scan, repair, compare and download. Served on the loopback alone, or as a Space of the Hub.

Each run is a child process with the command line of `commands`; `runs` starts and stops it, `screen` reads what it says, `parts` and
`layout` make what is seen, and `events` joins them. Nothing here is imported before the page is asked for: gradio is an extra.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from hf_purify.errors import ConfigError, MissingExtra, OutputError


def is_space() -> bool:
    """Whether this runs as a Space of the Hub, which strangers reach; else only this machine does."""
    return bool(os.environ.get("SPACE_ID"))


@contextmanager
def serve(folder: str | Path = "hf-purify-ui", port: int | None = None, *, browser: bool = False) -> Iterator[str]:
    """Serve the page while the block runs, and give its address. Runs that are under way are stopped at the end.

    Args:
        folder: work folder; each run writes a folder below it.
        port: None takes the first free one from 7860 on.
        browser: open the page in the browser of this machine.

    Raises:
        MissingExtra: there is no gradio.
        ConfigError: the port is taken, or this system has no pseudo-terminals.
        OutputError: the work folder cannot be written.
    """
    if not hasattr(os, "openpty"):
        raise ConfigError("the page needs a system with pseudo-terminals: Linux, macOS, or Windows with WSL")
    work, space = Path(folder).expanduser().absolute(), is_space()
    try:
        work.mkdir(parents=True, exist_ok=True)
        downloads = tempfile.TemporaryDirectory(dir=work, prefix=".downloads-", ignore_cleanup_errors=True)
    except OSError as error:
        raise OutputError(f"cannot write to '{folder}': {error.strerror or error}; name another folder (--folder)") from error
    # gradio reads these at its import. Its own folder for files is one that all its apps on a machine share, and serve.
    settings = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False", "GRADIO_TEMP_DIR": downloads.name}
    with downloads, _environment(settings):
        try:
            import gradio  # noqa: F401
        except ImportError as error:
            raise MissingExtra("the page needs gradio: pip install 'hf-purify[ui]'") from error
        from hf_purify.ui.app import build, launch
        from hf_purify.ui.runs import Runs

        with closing(Runs(work, public=space)) as runs:
            blocks = build(runs)
            try:
                yield launch(blocks, "0.0.0.0" if space else "127.0.0.1", port, browser)
            finally:
                blocks.close(verbose=False)


@contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    """Set variables of the environment while the block runs."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ |= settings
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
