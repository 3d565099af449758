"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give another name beside `path` to write to, which takes its place when the block ends well."""
    work = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield work
        os.replace(work, path)
    finally:
        work.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Write a text; what was there before stays until it is complete."""
    with replacing(path) as work:
        work.write_text(text, encoding="utf-8", errors="replace")
