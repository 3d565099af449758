"""Names of files that a stranger chose: in a repository's listing, in an index, in a config, and as links of a folder.

Names are judged as they are written, by the rules of POSIX and of Windows at once: a checkpoint that is good on one machine is good
on the other.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from hf_purify.errors import UnsafeCheckpoint, shown

LONGEST_NAME = 1024  # characters of a whole name
LONGEST_PART = 255  # bytes between two slashes, as file systems have it
DEVICES = {"con", "prn", "aux", "nul", "conin$", "conout$", *(f"{d}{n}" for d in ("com", "lpt") for n in "0123456789\u00b9\u00b2\u00b3")}
# In the Hub's cache a file is a link from snapshots/COMMIT/ to blobs/HASH of the same repository.
BLOB = re.compile(r"(?:\.\./)+blobs/(?:[0-9a-f]{64}|[0-9a-f]{40})")
TEMPLATES = "additional_chat_templates"  # the one folder in a checkpoint whose files transformers opens


def check_name(name: Any, where: str) -> None:
    """Refuse a file name that could lead out of its folder, or that is another file's on another system.

    Args:
        where: what holds the name, for the message.

    Raises:
        UnsafeCheckpoint: no relative POSIX name of ordinary characters.
    """
    if problem := escape(name) or _unportable(name):
        raise UnsafeCheckpoint(f"{where} names the file {shown(name)}: {problem}; expected a plain name inside the checkpoint")


def check_listing(names: Iterable[str], wanted: Iterable[str], source: str) -> None:
    """Refuse a repository that lists names which lead out of a folder, or bad ones among those that would be fetched.

    Args:
        wanted: patterns of the names that would be fetched.

    Raises:
        UnsafeCheckpoint: names the first such file.
    """
    patterns = list(wanted)
    for name in names:
        last = re.split(r"[/\\]", name)[-1]
        if escape(name) or any(fnmatch(n, p) for n in (name, last) for p in patterns):
            check_name(name, f"the repository '{source}'")


def escape(name: Any) -> str:
    """How a name could lead out of its folder; an empty text where it could not."""
    if not isinstance(name, str) or not name:
        return "it is empty or no text"
    if len(name) > LONGEST_NAME:
        return f"it has {len(name)} characters"
    if any(c < " " or c == "\x7f" or "\ud800" <= c <= "\udfff" for c in name):
        return "it holds control characters"
    if name.startswith("/"):
        return "it is absolute"
    if "\\" in name:
        return "it holds a backslash, which parts names on Windows"
    if re.match(r"[A-Za-z]:", name):
        return "it begins with a drive"
    parts = name.split("/")
    return "it goes up by '..', or has an empty part" if {"", ".", ".."} & set(parts) else ""


def _unportable(name: str) -> str:
    """Why a name that stays in its folder is no plain file's everywhere."""
    if not name.isprintable():
        return "it holds characters that are not shown"
    if found := re.search(r'[<>:"|?*]', name):
        return f"it holds '{found[0]}', which Windows does not allow"
    for part in name.split("/"):
        if len(part.encode("utf-8")) > LONGEST_PART:
            return f"a part of it has more than {LONGEST_PART} bytes"
        if part.endswith((".", " ")):
            return "a part of it ends with a dot or a space, which Windows drops"
        if part.partition(".")[0].rstrip(" ").lower() in DEVICES:
            return f"'{part}' is a device on Windows"
    return ""


def check_links(folder: Path, source: str) -> None:
    """Refuse links to files outside a checkpoint's folder; those of the Hub's cache lead to blobs of the same repository, and are good.

    Raises:
        UnsafeCheckpoint: names the first link that leaves.
    """
    for file in folder.iterdir():
        if file.is_symlink() and (file.name == TEMPLATES or not file.is_dir()):
            _check_link(file, folder, source)
    templates = folder / TEMPLATES
    for file in templates.iterdir() if templates.is_dir() else ():
        if file.is_symlink():
            _check_link(file, folder, source)


def _check_link(link: Path, folder: Path, source: str) -> None:
    target = os.readlink(link).replace(os.sep, "/")
    depth = len(link.relative_to(folder).parts) + 1  # up to the repository, from snapshots/COMMIT
    if BLOB.fullmatch(target) and target.count("../") == depth and folder.absolute().parent.name == "snapshots":
        blob = folder.absolute().parent.parent / target[3 * depth :]
        if not blob.is_symlink():
            return
    # as it is written, and over links that it goes through
    if not all(Path(made(link.parent / target)).is_relative_to(made(folder)) for made in (os.path.abspath, os.path.realpath)):
        raise UnsafeCheckpoint(
            f"'{link.name}' in '{source}' is a link to {shown(target)}, outside the checkpoint; put the file itself there"
        )
