"""The command line, called as a user would."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from hf_purify.cli import app


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])
