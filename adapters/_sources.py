"""What a cell of a data set holds of a picture or video: its content, or the name of a file. Shared by the modalities."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_purify.errors import DataError

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")  # of two letters at least: `C:` is a drive
HUB = "hf://"
ARCHIVES = ("zip://", "tar://")  # that such a file may lie in, as streams of the Hub have it: `zip://cat.png::hf://datasets/...`


def source_of(cell: Any, what: str, most: int) -> str | bytes:
    """Content, or the path of a file of this machine. What lies on the Hub is fetched; no other address is called, since a data set
    of a stranger could have this machine fetch anything.

    Args:
        cell: content, a path, or a mapping with `bytes` and `path`, as datasets stores pictures and videos undecoded.
        what: for messages, such as `row 3 of column 'image'`.
        most: bytes.

    Raises:
        DataError: nothing is there, it is empty or larger, no regular file, or lies elsewhere.
    """
    if isinstance(cell, Mapping):
        cell = cell["bytes"] if cell.get("bytes") is not None else cell.get("path")
    if isinstance(cell, bytes):
        return _of_size(len(cell), most, what, cell)
    if not isinstance(cell, (str, Path)) or not str(cell):
        raise DataError(f"{what} is missing: it has neither content nor a file")
    name = str(cell)
    what = f"{what} ('{name[:200]}')"
    if ADDRESS.match(name):
        return _fetched(name, what, most)
    try:
        file = Path(name)
        if not file.is_file():  # a pipe or a device would never end
            raise DataError(f"{what} " + ("is no regular file" if file.exists() else "does not exist"))
        return _of_size(file.stat().st_size, most, what, name)
    except (OSError, ValueError) as error:
        raise DataError(f"{what} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _fetched(name: str, what: str, most: int) -> bytes:
    """The content of a file on the Hub."""
    *archives, place = name.split("::")
    if not place.startswith(HUB) or not all(part.startswith(ARCHIVES) for part in archives):
        raise DataError(f"{what} lies elsewhere, and only the Hub is called for data ({HUB}...): download it, or leave the row out")
    import fsspec

    try:
        with fsspec.open(name, "rb") as file:
            content = file.read(most + 1)
    except Exception as error:  # of the network, the Hub, and whatever an archive holds
        raise DataError(f"{what} cannot be fetched: {type(error).__name__}: {error}") from error
    return _of_size(len(content), most, what, content)


def _of_size(size: int, most: int, what: str, source: Any) -> Any:
    if not size:
        raise DataError(f"{what} is empty: it has no content")
    if size > most:
        raise DataError(f"{what} has {size / 2**20:,.0f} MiB; {most / 2**20:,.0f} are the most")
    return source
