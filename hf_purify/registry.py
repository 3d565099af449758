"""Find methods and adapters by name: what lies in the tree first, then what other packages declare as entry points."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from hf_purify.adapter import Adapter
from hf_purify.errors import ConfigError, PurifyError, UnknownName, unknown
from hf_purify.method import Method, Sequential

_KINDS: dict[str, tuple[str, type, str]] = {
    "method": ("hf_purify.methods", Method, "hf_purify.methods"),
    "adapter": ("hf_purify_adapters", Adapter, "hf_purify.adapters"),
}


def _in_tree(kind: str) -> list[str]:
    package = importlib.import_module(_KINDS[kind][0])
    return [m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")]


def _declared(kind: str) -> dict[str, EntryPoint]:
    return {e.name: e for e in entry_points(group=_KINDS[kind][2])}


def names(kind: str) -> list[str]:
    """All known names of a kind, `method` or `adapter`, sorted."""
    return sorted({*_in_tree(kind), *_declared(kind)})


def find(kind: str, name: str) -> Any:
    """The class that a name stands for.

    Raises:
        UnknownName: there is none; with a suggestion.
        ConfigError: the name stands for two things, or for something that does not keep the contract.
    """
    package, base, group = _KINDS[kind]
    inside, outside = name in _in_tree(kind), _declared(kind).get(name)
    if inside and outside:
        raise ConfigError(f"{kind} '{name}' exists twice: in hf-purify and as entry point {group} of {outside.value}; rename the plugin")
    if outside:
        found = outside.load()
        if not (inspect.isclass(found) and issubclass(found, base)):
            raise ConfigError(f"entry point {group}:{name} ({outside.value}) must be a subclass of {base.__name__}; got {found!r}")
    elif inside:
        module = importlib.import_module(f"{package}.{name}")
        classes = [
            c
            for c in vars(module).values()
            if inspect.isclass(c) and issubclass(c, base) and c.__module__ == module.__name__ and not inspect.isabstract(c)
        ]
        found = next((c for c in classes if getattr(c, "name", None) == name), None)
        if found is None:
            raise ConfigError(f"{package}.{name} must define a subclass of {base.__name__} whose name is '{name}'")
    else:
        raise unknown(kind, name, names(kind))
    return found


def make_method(spec: str, **options: Any) -> Method:
    """Build a method from its name, or a sequence from names joined by `+`.

    Args:
        options: settings; in a sequence written `method.option`.
    """
    parts = [p.strip() for p in spec.split("+")]
    if len(parts) == 1:
        return find("method", parts[0])(**options)
    known = set(parts)
    for key in options:
        if key.partition(".")[0] not in known:
            raise ConfigError(f"option '{key}' of the sequence '{spec}' must be written method.option, for example {parts[0]}.{key}")
    own = [{k.partition(".")[2]: v for k, v in options.items() if k.startswith(f"{p}.")} for p in parts]
    return Sequential([find("method", p)(**o) for p, o in zip(parts, own, strict=True)])


def find_trigger(adapter: Adapter, name: str, **options: Any) -> Any:
    """Build a trigger of an adapter by name.

    Raises:
        UnknownName: no such trigger.
        ConfigError: no such option, or a value outside its range.
    """
    known = adapter.triggers()
    if name not in known:
        others = [n for n in names("adapter") if n != adapter.name and name in find("adapter", n)().triggers()]
        if others:
            listed = ", ".join(sorted(known))
            raise UnknownName(
                f"'{name}' is a trigger of {', '.join(others)}, and this model is one of {adapter.name} (its triggers: {listed})"
            )
        raise unknown("trigger", name, known)
    fields = list(inspect.signature(known[name]).parameters)
    for option in options:
        if option not in fields:
            raise PurifyError(str(unknown(f"option of trigger '{name}':", option, fields)))
    return known[name](**options)
