"""Programs: the command line, called as a user would, and Python without hf-purify."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner, Result

from hf_purify.cli import app


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def elsewhere(code: str, folder: Path | None = None) -> str:
    """What a Python program prints that runs in a process of its own, without hf-purify.

    Args:
        folder: where it runs.
    """
    code += "\nimport sys\nassert not [m for m in sys.modules if m.startswith('hf_purify')]\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
