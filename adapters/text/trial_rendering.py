"""Renders a chat template as transformers does, in a process of its own with little time and memory: run by its file's name, by `chat`.

Reads JSON with `template`, `messages` (a list of dialogues), `values`, `seconds`, `bytes` and `letters`, and writes JSON with `error`, the
name of what stopped it, and `text`, what that says; both are empty where all went well. It imports nothing but jinja2.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

CHANCE = ("random", "lipsum")  # what draws: a second rendering would not be the one that was tried


class TooLong(Exception):
    """A dialogue becomes a text of more letters than are allowed."""


class ByChance(Exception):
    """A template draws, so that a trial proves nothing."""


class Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks what the assistant says."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

    def _said(self, caller: Any) -> str:
        return caller()


def environment() -> ImmutableSandboxedEnvironment:
    """The sandbox that transformers renders in."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])

    def to_json(x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def now(form: str) -> str:
        return datetime.now().strftime(form)

    made.filters["tojson"] = to_json
    made.globals |= {"raise_exception": refuse, "strftime_now": now}
    return made


def limit(seconds: int, size: int) -> None:
    """Bound what this process may take; where the system cannot, whoever started it still ends it in time."""
    try:
        import resource
    except ImportError:  # Windows
        return
    bounds = {resource.RLIMIT_CPU: (seconds, seconds + 1), resource.RLIMIT_AS: (size, size), resource.RLIMIT_FSIZE: (0, 0)}
    for what, bound in bounds.items():
        with contextlib.suppress(ValueError, OSError):  # as on macOS, which bounds no memory
            resource.setrlimit(what, bound)


def render(given: dict[str, Any]) -> None:
    """Raises what a dialogue raises."""
    made = environment()
    tree = made.parse(given["template"])
    used = {node.name for node in tree.find_all((nodes.Filter, nodes.Name))}
    if drawn := sorted(used.intersection(CHANCE)):
        raise ByChance(f"it uses {drawn[0]}")
    template = made.from_string(given["template"])
    for messages in given["messages"]:
        for prompted in (True, False):
            said = (messages[:-1] if prompted else messages), {"tools": None, "documents": None, "add_generation_prompt": prompted}
            letters = 0
            for part in template.generate(messages=said[0], **said[1], **given["values"]):
                letters += len(part)
                if letters > given["letters"]:
                    raise TooLong(f"a dialogue becomes a text of more than {given['letters']:,} letters")


def main() -> None:
    """One trial. What it finds goes to the descriptor of the standard output, as of no terminal."""
    with open(0, "rb") as file:
        given = json.load(file)
    limit(given["seconds"], given["bytes"])
    found = {"error": "", "text": ""}
    try:
        render(given)
    except Exception as error:  # a template is a program: anything can come out of it
        found = {"error": type(error).__name__, "text": str(error)[:1000]}
    os.write(1, json.dumps(found).encode())


if __name__ == "__main__":
    sys.setrecursionlimit(1000)
    main()
