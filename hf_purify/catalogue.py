"""What is installed: methods, adapters, triggers and recipes, each with a line of description and a card."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable
from typing import Any

from hf_purify import registry
from hf_purify.errors import unknown
from hf_purify.specs import presets


def kinds() -> dict[str, Callable[[], dict[str, str]]]:
    """What can be listed: kind -> name -> one line."""
    return {
        "methods": methods,
        "adapters": adapters,
        "triggers": triggers,
        "recipes": lambda: {name: path.as_posix() for name, path in presets().items()},
    }


def methods() -> dict[str, str]:
    found = {name: registry.find("method", name) for name in registry.names("method")}
    return {name: ("control: " if method.control else "") + _first_line(method) for name, method in found.items()}


def adapters() -> dict[str, str]:
    return {name: _first_line(sys.modules[registry.find("adapter", name).__module__]) for name in registry.names("adapter")}


def triggers() -> dict[str, str]:
    """Several modalities may have a trigger of one name: each of them has a line then."""
    found: dict[str, list[str]] = {}
    for name in registry.names("adapter"):
        for trigger, made in registry.find("adapter", name)().triggers().items():
            found.setdefault(trigger, []).append(f"{name}: {_first_line(made)}")
    return {trigger: "\n".join(lines) for trigger, lines in sorted(found.items())}


def card(name: str) -> str:
    """The card of a method with its settings, or what there is to say about an adapter or trigger, as Markdown.

    Raises:
        UnknownName: there is no such thing.
    """
    if name in registry.names("method"):
        method = registry.find("method", name)
        return f"{method.card()}\n\n## Settings\n\n{_settings(method.config_class)}"
    triggers = {adapter: registry.find("adapter", adapter)().triggers() for adapter in registry.names("adapter")}
    if name in triggers:
        found = registry.find("adapter", name)
        return f"# {name}\n\n{sys.modules[found.__module__].__doc__}\n\nTask: `{found.task}`. Triggers: {', '.join(triggers[name])}."
    made = {adapter: known[name] for adapter, known in triggers.items() if name in known}
    if made:
        parts = [f"# {name} ({a})\n\n{inspect.getdoc(t) or ''}\n\n## Settings\n\n{_settings(t)}" for a, t in made.items()]
        return "\n\n".join(parts)
    raise unknown("name", name, [n for listed in kinds().values() for n in listed()])


def _first_line(thing: Any) -> str:
    return (thing.__doc__ or "").strip().partition("\n")[0]


def _settings(config: Any) -> str:
    """The fields of a dataclass with their defaults, as a list."""
    defaults = {f.name: "required" if f.default is dataclasses.MISSING else f.default for f in dataclasses.fields(config)}
    return "\n".join(f"- `{name}` = `{default}`" for name, default in defaults.items()) or "none"
