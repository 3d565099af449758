"""Every error that hf-purify raises on purpose: what was expected, what came, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, get_args, get_origin

from hf_purify.redaction import redacted


class PurifyError(Exception):
    """Base of all deliberate errors. The command line prints its message and exits with `exit_code`. No message holds a token."""

    exit_code = 2

    def __init__(self, *parts: object) -> None:
        super().__init__(*(redacted(part) if isinstance(part, str) else part for part in parts))


class UnknownName(PurifyError):
    """A method, trigger, adapter, recipe or option that does not exist."""


class ConfigError(PurifyError):
    """A setting outside its range, of the wrong type, or in conflict with another."""


class DataError(PurifyError):
    """Samples that cannot be used: missing columns, labels out of range, wrong channels, empty sets."""


class ModelError(PurifyError):
    """A model that cannot be repaired: wrong task, NaN weights, quantized weights, no neurons."""


class UnsafeCheckpoint(PurifyError):
    """A checkpoint that would have to be trusted to be read: pickles, remote code."""


class IndexMismatch(PurifyError):
    """A mask or score made for other neurons than those of this model."""


class OutputError(PurifyError):
    """An output folder that exists or cannot be written."""


class PublishError(PurifyError):
    """A push that the Hub refuses, or that should not be made: victims, repairs that cost too much, files that a report is not true of."""


class MissingExtra(PurifyError):
    """An optional package is absent; the message names the install command."""


class Diverged(PurifyError):
    """A loss became NaN or infinite; the message names the step."""

    exit_code = 4


class NotAVictim(PurifyError):
    """`implant` ended with an attack success rate too low to call the model backdoored."""

    exit_code = 5


def shown(value: Any, most: int = 80) -> str:
    """What a stranger's file says, for a message: quoted, with what would steer a terminal escaped, and not too long.

    >>> shown("a\\x1b[2J")
    "'a\\\\x1b[2J'"
    """
    text = ascii(value[: most + 1]) if isinstance(value, (str, list)) else ascii(value)
    return text if len(text) <= most else f"{text[:most]}..."


def first_line(error: BaseException) -> str:
    """What an error of another library says, in a line; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the nearest of `choices`, or an empty string.

    >>> did_you_mean("ntf", ["nft", "rnp"])
    "; did you mean 'nft'?"
    """
    match = difflib.get_close_matches(str(name), list(choices), n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else ""


def unknown(kind: str, name: str, choices: Iterable[str]) -> UnknownName:
    """Build the error for a name that is not among `choices`."""
    choices = sorted(choices)
    listed = ", ".join(choices) if choices else "none is installed"
    return UnknownName(f"unknown {kind} '{name}'{did_you_mean(name, choices)} (known: {listed})")


def checked_type(what: str, value: Any, hint: Any) -> Any:
    """A value held against the type that its field is declared with; an int is good where a float is, a bool only where a bool is.

    `1e-4`, which YAML reads as a text, becomes a number where one is expected and a text is not.

    Raises:
        ConfigError: another type.
    """
    allowed = (hint,) if get_origin(hint) in (list, dict) else get_args(hint) or (hint,)
    if Any in allowed:
        return value
    origins = tuple(getattr(t, "__origin__", t) for t in allowed)
    if hasattr(hint, "__origin__") and hint.__origin__ in (list, dict):
        origins = (hint.__origin__, str) if hint.__origin__ is list else (dict,)
    if float in origins:
        origins += (int,)
        if isinstance(value, str) and str not in origins:
            with suppress(ValueError):
                value = float(value)
    if (isinstance(value, bool) and bool not in origins) or not isinstance(value, origins):
        expected = " or ".join("a number" if t is float else t.__name__ for t in origins if t is not int or float not in origins)
        raise ConfigError(f"{what} must be {expected.replace('NoneType', 'None')}, got {type(value).__name__} ({value!r})")
    return value
