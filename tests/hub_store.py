"""What the Hub of the tests keeps: repositories with their commits, branches, pull requests and large files.

Nothing here knows of HTTP but `Refused`, which carries the status that the Hub answers with.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any
from urllib.parse import unquote

DATE = "2026-01-01T00:00:00.000Z"
PULL_REQUEST = re.compile(r"refs/pr/(\d+)")


class Refused(Exception):
    """A request that is answered with an error.

    Args:
        status: The HTTP status.
        message: What the client shows.
        code: The `X-Error-Code` by which the client chooses the exception, where it has one.
        headers: More headers of the answer.
        body: More of the JSON answer.
    """

    def __init__(self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None, **body: Any) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}
        self.body = {"error": message, **body}


@dataclass(frozen=True)
class File:
    """The content of a file, and whether it is kept as a large file, of which git has a pointer alone."""

    content: bytes
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n".encode()

    @cached_property
    def blob(self) -> str:
        """The id of git's object."""
        content = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob


@dataclass(frozen=True)
class Commit:
    """All files after a commit, and what was said of it."""

    files: Mapping[str, File]
    title: str
    message: str = ""
    author: str = ""
    parent: str | None = None


@dataclass
class Discussion:
    """A discussion or a pull request; `base` is the commit that a pull request was opened from."""

    num: int
    title: str
    author: str
    base: str | None = None
    status: str = "open"
    merged: str | None = None
    events: list[dict[str, Any]] = field(default_factory=list)

    def record(self, kind: str, author: str, **data: Any) -> dict[str, Any]:
        """Add an event (a comment, a commit, a change of status) and return it."""
        event = {"id": f"{self.num:08}{len(self.events):08}", "type": kind, "createdAt": DATE, "author": {"name": author}, "data": data}
        self.events.append(event)
        return event


@dataclass
class Repository:
    """One repository: `kind` is models, datasets or spaces, `name` is owner/name."""

    kind: str
    name: str
    private: bool = False
    gated: bool | str = False  # or "auto" or "manual"
    granted: set[str] = field(default_factory=set)  # users who may read the files of a gated repository
    sdk: str | None = None
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # branches by their name, pull requests as refs/pr/1
    tags: dict[str, str] = field(default_factory=dict)
    discussions: list[Discussion] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)  # large files that were uploaded, by their SHA-256

    @property
    def owner(self) -> str:
        return self.name.split("/")[0]

    @property
    def path(self) -> str:
        """Where its pages are, below the endpoint."""
        return self.name if self.kind == "models" else f"{self.kind}/{self.name}"

    def add(self, commit: Commit, ref: str = "main") -> str:
        """Keep a commit, let `ref` point to it, and return its id."""
        facts = [self.kind, self.name, len(self.commits), commit.parent, commit.title, sorted((p, f.blob) for p, f in commit.files.items())]
        sha = hashlib.sha1(repr(facts).encode(), usedforsecurity=False).hexdigest()
        self.commits[sha] = commit
        self.refs[ref] = sha
        return sha

    def resolve(self, revision: str) -> str:
        """The commit that a branch, tag, pull request or commit id names.

        Raises:
            Refused: there is none.
        """
        name = unquote(revision)
        sha = self.refs.get(name.removeprefix("refs/heads/")) or self.tags.get(name.removeprefix("refs/tags/"))
        if sha is None and name not in self.commits:
            raise Refused(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return sha or name

    def files(self, revision: str) -> Mapping[str, File]:
        return self.commits[self.resolve(revision)].files

    def history(self, revision: str) -> list[tuple[str, Commit]]:
        """The commits up to a revision, the last first."""
        found, sha = [], self.resolve(revision) if self.commits else None
        while sha is not None:
            found.append((sha, self.commits[sha]))
            sha = self.commits[sha].parent
        return found

    def discuss(self, title: str, author: str, description: str, base: str | None = None, status: str = "open") -> Discussion:
        """Open a discussion, or with `base` a pull request that starts at that commit."""
        found = Discussion(len(self.discussions) + 1, title, author, base, status)
        found.record("comment", author, edited=False, hidden=False, latest={"raw": description, "html": description})
        self.discussions.append(found)
        if base is not None:
            self.refs[f"refs/pr/{found.num}"] = base
        return found

    def pull_request(self, ref: str) -> Discussion | None:
        """The pull request whose reference this is."""
        found = PULL_REQUEST.fullmatch(ref)
        return self.discussions[int(found[1]) - 1] if found and ref in self.refs else None

    def changed(self, request: Discussion) -> dict[str, File | None]:
        """What a pull request changes: the new content of each path, None where it is deleted."""
        before, after = self.files(request.base or "main"), self.files(f"refs/pr/{request.num}")
        return {path: after.get(path) for path in sorted({*before, *after}) if before.get(path) != after.get(path)}

    def conflicts(self, request: Discussion) -> list[str]:
        """Paths that the pull request and the main branch have changed to different contents since it was opened."""
        before, now = self.files(request.base or "main"), self.files("main")
        return [path for path, new in self.changed(request).items() if now.get(path) not in (before.get(path), new)]

    def merge(self, request: Discussion, user: str) -> None:
        """Put a pull request's changes onto the main branch.

        Raises:
            Refused: it is merged or closed already, or the main branch says otherwise.
        """
        if request.base is None or request.status not in ("open", "draft"):
            raise Refused(400, f"This pull request cannot be merged: it is {request.status if request.base else 'a discussion'}")
        if conflicts := self.conflicts(request):
            raise Refused(400, f"This pull request has conflicts with the main branch: {', '.join(conflicts)}")
        merged = {**self.files("main"), **self.changed(request)}
        files = {path: file for path, file in merged.items() if file is not None}
        head = self.commits[self.refs[f"refs/pr/{request.num}"]]
        request.merged = self.add(replace(head, files=files, author=user, parent=self.refs["main"]))
        request.status = "merged"
        request.record("status-change", user, status="merged")


def folders(files: Mapping[str, File]) -> set[str]:
    """The folders that hold the files, and those that hold these."""
    return {"/".join(path.split("/")[:i]) for path in files for i in range(1, path.count("/") + 1)}


def entry(path: str, file: File) -> dict[str, Any]:
    """A file as the Hub lists it."""
    found: dict[str, Any] = {"type": "file", "path": path, "oid": file.blob, "size": len(file.content)}
    if file.lfs:
        found["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": len(file.pointer)}
    return found
