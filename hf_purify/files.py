"""Files that are there whole or not at all, and names that are free."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from hf_purify.errors import OutputError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give another name beside `path` to write to, which takes its place when the block ends well."""
    work = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield work
        os.replace(work, path)
    finally:
        work.unlink(missing_ok=True)


def write_texts(folder: Path, texts: Mapping[str, str], what: str) -> Path:
    """Write files into a folder, which is made; each replaces its predecessor whole or not at all. Returns the folder.

    Raises:
        OutputError: it cannot be written; `what` was to be.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            replace_text(folder / name, text)
    except OSError as error:
        raise OutputError(f"cannot write the {what} to '{folder}': {error}; name another folder") from error
    return folder


def replace_text(path: Path, text: str) -> None:
    """Write a text; what was there before stays until it is complete."""
    with replacing(path) as work:
        work.write_text(text, encoding="utf-8", errors="replace")


def free_name(folder: Path, taken: Collection[Path] = ()) -> Path:
    """`folder`, or `folder-2`, `folder-3`, ... where it exists or is `taken`."""
    found, k = folder, 1
    while found.exists() or found in taken:
        k += 1
        found = folder.with_name(f"{folder.name}-{k}")
    return found
