"""What a command says passes here: no log, warning, traceback or usage error shows a token or steers the terminal."""

from __future__ import annotations

import logging
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from hf_purify.redaction import lines, one_line


def say(text: str, color: str | None = None) -> None:
    """A message on stderr; its lines after the first are indented, so that none of them passes for another message."""
    typer.secho(lines(text, indent="  "), fg=color, err=True)


def defect(error: Exception) -> str:
    """The traceback of an error that nobody foresaw. It shows no values of variables."""
    return lines("".join(traceback.format_exception(error)).rstrip())


def shield_logs() -> None:
    """Let all that loggers and warnings of this process say, also those of other libraries, pass through `lines`."""
    made = logging.getLogRecordFactory()
    if not isinstance(made, _Records):
        logging.setLogRecordFactory(_Records(made))
    if not isinstance(warnings.formatwarning, _Warnings):
        warnings.formatwarning = _Warnings(warnings.formatwarning)


class _Records:
    """Makes the records of logs, with their text as it may be shown."""

    def __init__(self, made: Callable[..., logging.LogRecord]) -> None:
        self.made = made

    def __call__(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        record = self.made(*args, **kwargs)
        try:
            record.msg, record.args = lines(record.getMessage()), None
        except (TypeError, ValueError, KeyError):  # arguments that do not fit: the handler says so
            return record
        if record.exc_info and record.exc_info[1] is not None:
            record.exc_text = lines("".join(traceback.format_exception(record.exc_info[1])).rstrip())
        return record


class _Warnings:
    """Formats warnings as they may be shown."""

    def __init__(self, made: Callable[..., str]) -> None:
        self.made = made

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        return lines(self.made(*args, **kwargs))


@contextmanager
def _usage() -> Iterator[None]:
    """Arguments that the command line cannot read are quoted in its errors."""
    try:
        yield
    except Exception as error:
        if hasattr(error, "format_message") and isinstance(getattr(error, "message", None), str):
            error.message = one_line(error.message)  # type: ignore[attr-defined]
        raise


class Group(TyperGroup):
    """The command with its subcommands."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _usage():
            return super().make_context(*args, **kwargs)

    def invoke(self, *args: Any, **kwargs: Any) -> Any:
        with _usage():
            return super().invoke(*args, **kwargs)


class Command(TyperCommand):
    """A command of its own."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _usage():
            return super().make_context(*args, **kwargs)
