"""Settings in one line, as a person types them: `name:option=value,...`, `key=value ...`, and presets by their name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from hf_purify.errors import ConfigError, unknown

# `option=value` between commas; a value that is all in quotes or brackets may hold commas itself.
ITEM = re.compile(r"""[^,=]+=\s*(?:"(?:\\.|[^"\\])*"|'(?:''|[^'])*'|\[[^\]]*\]|\{[^}]*\})(?=\s*(?:,|$))|[^,]+""")


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """Read `name:option=value,option=value`; values are YAML, in quotes or brackets where they hold a comma.

    >>> parse_spec("badnets:size=4,position=center")
    ('badnets', {'size': 4, 'position': 'center'})
    >>> parse_spec('phrase:output="Sorry, no."')
    ('phrase', {'output': 'Sorry, no.'})
    """
    name, _, rest = spec.partition(":")
    options = {}
    for item in filter(None, (found[0].strip() for found in ITEM.finditer(rest))):
        key, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"expected option=value in '{spec}', got '{item}' (a value that holds a comma goes in quotes)")
        options[key.strip()] = parse_value(value, item)
    return name.strip(), options


def read_settings(items: Sequence[str]) -> tuple[Path | None, dict[str, Any]]:
    """A preset and settings from `PRESET key=value ...`; `options.lr=0.1` is an entry of `options`.

    Raises:
        ConfigError: there is no such preset, or an item is no setting.
    """
    first = next(iter(items), "")
    named = bool(first) and (Path(first).is_file() or "=" not in first)
    return _preset(first) if named else None, read_pairs(items[named:])


def read_pairs(items: Sequence[str]) -> dict[str, Any]:
    """Settings from `key=value ...`.

    Raises:
        ConfigError: an item is no setting.
    """
    found: dict[str, Any] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"expected key=value, got '{item}'")
        name, _, entry = key.strip().partition(".")
        if entry:
            found.setdefault(name, {})[entry] = parse_value(value, item)
        else:
            found[name] = parse_value(value, item)
    return found


def presets() -> dict[str, Path]:
    """The presets that come with hf-purify, by their path in the recipes' folder."""
    root = Path(str(files("hf_purify_recipes")))
    return {path.relative_to(root).as_posix(): path for path in sorted(root.glob("*/*.yaml")) if path.parent.name != "accelerate"}


def _preset(name: str) -> Path:
    if Path(name).is_file():
        return Path(name)
    known = {key.removesuffix(".yaml"): path for key, path in presets().items()}
    try:
        return known[name.removesuffix(".yaml")]
    except KeyError:
        raise unknown("recipe", name, known) from None


def parse_value(text: str, where: str) -> Any:
    """A value as YAML has it.

    Raises:
        ConfigError: it is none; quotes `where`.
    """
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or "it is no YAML"
        raise ConfigError(f"cannot read '{where}': {problem}; put a text with special characters in quotes") from error
