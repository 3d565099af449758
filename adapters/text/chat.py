"""Chat templates: programs that come with a checkpoint. Each dialogue is rendered in a process of its own with limits before it is here."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from hf_purify.errors import DataError, UnsafeCheckpoint

Turns = Sequence[Mapping[str, str]]

LONGEST = 2**20  # letters of a template
LETTERS = 2**22  # of a dialogue as it is rendered, for each letter that it has, and four million more
MEMORY = 2**29  # bytes of the process that tries a template
SECONDS = 5  # of its processor, and one more for each `EACH` dialogues
EACH = 100
# What a sandbox raises where a template reaches for more than a text: none that is meant well does.
HOSTILE = ("MemoryError", "SecurityError", "RecursionError", "TooLong", "ByChance")

_tried: set[bytes] = set()  # dialogues, with their templates, that have been rendered well


def check_template(tokenizer: Any, dialogues: Sequence[Turns], source: str = "the checkpoint") -> None:
    """Render dialogues with a tokenizer's chat template where it can do no harm; those that have been rendered before are left out.

    Args:
        dialogues: with the answer as the last turn.
        source: of the template, for messages.

    Raises:
        UnsafeCheckpoint: the template takes too much time or memory, writes too much, or reaches out of its sandbox.
        DataError: it cannot render a dialogue.
    """
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:  # it has several, and none for a plain dialogue
        raise DataError(f"the chat template failed: {error}") from error
    if not isinstance(template, str):
        raise DataError(f"the chat template of {source} must be a text, got {type(template).__name__}")
    if len(template) > LONGEST:
        raise UnsafeCheckpoint(f"the chat template of {source} has {len(template):,} letters; {LONGEST:,} are the most")
    values = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    begun = hashlib.sha256(json.dumps([template, values]).encode())
    new: dict[bytes, Turns] = {}
    for turns in dialogues:
        digest = begun.copy()
        digest.update(json.dumps(turns).encode())
        if digest.digest() not in _tried:
            new[digest.digest()] = turns
    if new:
        _try(template, list(new.values()), values, source)
        _tried.update(new)


def _try(template: str, dialogues: Sequence[Turns], values: Mapping[str, str], source: str) -> None:
    """Render dialogues in another process.

    Raises:
        UnsafeCheckpoint, DataError: as in `check_template`.
    """
    seconds = SECONDS + len(dialogues) // EACH
    letters = LETTERS + sum(len(turn["content"]) for turns in dialogues for turn in turns)
    given = {"template": template, "messages": dialogues, "values": values, "seconds": seconds, "bytes": MEMORY, "letters": letters}
    script = Path(__file__).with_name("trial_rendering.py")
    # isolated, it looks for packages neither where it is run nor where the environment says: it is told where jinja2 lies
    paths = sorted({str(Path(module.__file__).parents[1]) for module in (jinja2, markupsafe) if module.__file__})
    code = f"import runpy, sys; sys.path += {paths!r}; runpy.run_path({str(script)!r}, run_name='__main__')"
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", code], input=json.dumps(given).encode(), capture_output=True, timeout=seconds + 50, check=False
        )
    except subprocess.TimeoutExpired:
        raise _unsafe(source, f"it does not end within {seconds + 50} seconds") from None
    if done.returncode == -getattr(signal, "SIGXCPU", 0):
        raise _unsafe(source, f"it takes more than {seconds} seconds")
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip().splitlines() or ["without a word"]
        raise _unsafe(source, f"it ended with code {done.returncode}: {words[-1]}")
    found = json.loads(done.stdout)
    if found["error"] in HOSTILE:
        raise _unsafe(source, f"{found['error']}: {found['text'] or f'it takes more than {MEMORY // 2**20} MiB'}")
    if found["error"]:
        raise DataError(f"the chat template failed: {found['error']}: {found['text']}")


def _unsafe(source: str, what: str) -> UnsafeCheckpoint:
    return UnsafeCheckpoint(
        f"the chat template of {source} is not used, as its trial in a process of its own failed ({what}); look at chat_template.jinja, or "
        "give data without dialogues"
    )
