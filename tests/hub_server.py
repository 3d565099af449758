"""A Hub on the loopback that the tests start: repositories with commits, served to the real client over HTTP.

It answers what `huggingface_hub`, transformers, timm and datasets ask when they pull. Every request is kept in `requests`, with its
`Authorization` header, so that a test can say what was fetched and what was sent along.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS = (".safetensors", ".parquet", ".bin")
DATE = "2026-01-01T00:00:00.000Z"


@dataclass
class Repository:
    """The commits of one repository, each with all its files."""

    kind: str
    name: str
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Mapping[str, bytes], ref: str = "main") -> str:
        """Make a commit that holds exactly `files`, and let `ref` point to it."""
        content = repr([self.name, len(self.commits), sorted(files.items())]).encode()
        sha = hashlib.sha1(content, usedforsecurity=False).hexdigest()
        self.commits[sha] = dict(files)
        self.refs[ref] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch, tag or commit id names."""
        revision = unquote(revision)
        return self.refs.get(revision.removeprefix("refs/heads/")) or (revision if revision in self.commits else None)


class Hub:
    """The server's content, and what it was asked."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[tuple[str, str, str | None]] = []  # verb, path, Authorization header
        self.endpoint = ""
        self.closed: dict[str, str] = {}  # repositories that are not public, and the token that opens each

    def push(self, kind: str, name: str, folder: Path, ref: str = "main") -> str:
        """Commit a folder's files to the repository of `kind` (models or datasets), made if need be; returns the commit."""
        repository = self.repositories.setdefault((kind, name), Repository(kind, name))
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        return repository.commit(files, ref)

    def fetched(self) -> set[str]:
        """Paths inside their repositories of all files whose content was sent."""
        return {path.split("/resolve/", 1)[1].split("/", 1)[1] for verb, path, _ in self.requests if verb == "GET" and "/resolve/" in path}


def entry(path: str, content: bytes) -> dict[str, Any]:
    """A file as the Hub lists it."""
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    found: dict[str, Any] = {"type": "file", "path": path, "oid": blob, "size": len(content)}
    if path.endswith(LFS):
        found["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return found


def folders(files: Mapping[str, bytes]) -> set[str]:
    return {"/".join(path.split("/")[:i]) for path in files for i in range(1, path.count("/") + 1)}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        """The requests are kept, not printed."""

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_GET

    def answer(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, path, self.headers.get("Authorization")))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if found := re.fullmatch(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.file(found[1] or "models", found[2], found[3], unquote(found[4]))
        if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?", path):
            return self.listing(found[1], found[2], found[3] or "revision", found[4] or "main", unquote(found[5] or ""), body)
        return self.error(404, "EntryNotFound", f"no route {path}")

    def found(self, kind: str, name: str, revision: str) -> tuple[Repository, str] | None:
        """The repository and the commit; where one is missing, the answer has been sent."""
        repository = self.hub.repositories.get((kind, name))
        token = self.hub.closed.get(name)
        if repository is None or (token and self.headers.get("Authorization") != f"Bearer {token}"):
            self.error(401 if token else 404, "RepoNotFound", "Repository not found")
            return None
        sha = repository.resolve(revision)
        if sha is None:
            self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repository, sha

    def listing(self, kind: str, name: str, what: str, revision: str, below: str, body: bytes) -> None:
        found = self.found(kind, name, revision)
        if found is None:
            return None
        repository, sha = found
        files = repository.commits[sha]
        if what == "revision":
            siblings = [{"rfilename": path, "size": len(content)} for path, content in files.items()]
            facts = {"id": name, "sha": sha, "private": False, "gated": False, "tags": [], "siblings": siblings, "lastModified": DATE}
            return self.send(200, facts)
        if what == "tree":
            query = parse_qs(urlsplit(self.path).query)
            deep = query.get("recursive", ["false"])[0].lower() in ("1", "true")
            prefix = below.rstrip("/") + "/" if below else ""
            listed = [{"type": "directory", "path": p, "oid": "0" * 40, "size": 0} for p in sorted(folders(files))]
            listed += [entry(path, content) for path, content in sorted(files.items())]
            listed = [e for e in listed if e["path"].startswith(prefix) and (deep or "/" not in e["path"][len(prefix) :])]
            return self.send(200, listed) if listed or not below else self.error(404, "EntryNotFound", below)
        form = "urlencoded" in (self.headers.get("Content-Type") or "")
        paths = parse_qs(body.decode()).get("paths", []) if form else json.loads(body)["paths"]
        known = folders(files)
        listed = [entry(p, files[p]) for p in paths if p in files]
        listed += [{"type": "directory", "path": p, "oid": "0" * 40, "size": 0} for p in paths if p in known]
        return self.send(200, listed)

    def file(self, kind: str, name: str, revision: str, path: str) -> None:
        found = self.found(kind, name, revision)
        if found is None:
            return None
        repository, sha = found
        content = repository.commits[sha].get(path)
        if content is None:
            return self.error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": sha})
        facts = entry(path, content)
        headers = {"X-Repo-Commit": sha, "ETag": f'"{facts["oid"]}"', "Accept-Ranges": "bytes"}
        if "lfs" in facts:
            digest = facts["lfs"]["oid"]
            headers |= {"ETag": f'"{digest}"', "X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(part[1]), min(int(part[2] or len(content)), len(content) - 1)
            return self.send_bytes(206, content[first : last + 1], headers | {"Content-Range": f"bytes {first}-{last}/{len(content)}"})
        return self.send_bytes(200, content, headers)

    def error(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        self.send(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})})

    def send(self, status: int, content: Any, headers: Mapping[str, str] | None = None) -> None:
        self.send_bytes(status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

    def send_bytes(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Type": "application/octet-stream", **headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def running() -> Iterator[Hub]:
    """A Hub that serves on a free port of the loopback while the block runs; clients find it by `HF_ENDPOINT=hub.endpoint`."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
