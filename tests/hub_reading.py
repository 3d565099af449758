"""What the Hub of the tests answers to readers: files, listings, what is known of a repository."""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import parse_qs, unquote

import yaml
from hub_cards_check import metadata
from hub_routes import NO_LOGIN, Answer, Request, route
from hub_store import DATE, File, Refused, Repository, entry, folders


@route("GET", "/api/whoami-v2")
def whoami(request: Request) -> Answer:
    account = request.account
    if account is None:
        raise Refused(401, NO_LOGIN)
    organizations = [{"type": "org", "name": name, "roleInOrg": "write"} for name in account.organizations]
    token = {"type": "access_token", "accessToken": {"displayName": "tests", "role": account.role, "createdAt": DATE}}
    return Answer.of({"type": "user", "id": f"{account.user}-id", "name": account.user, "orgs": organizations, "auth": token})


@route("GET", "/(?:(?P<kind>datasets|spaces)/)?{name}/resolve/{rev}/{path}")
def file(request: Request, kind: str | None, name: str, rev: str, path: str) -> Answer:
    """A file of a commit, or a part of it."""
    repository = request.readable(kind or "models", name, files=True)
    sha = repository.resolve(rev)
    found = repository.commits[sha].files.get(unquote(path))
    if found is None:
        raise Refused(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": sha})
    headers = {"Content-Type": "application/octet-stream", "X-Repo-Commit": sha, "ETag": f'"{found.etag}"', "Accept-Ranges": "bytes"}
    if found.lfs:
        headers |= {"X-Linked-Etag": f'"{found.sha256}"', "X-Linked-Size": str(len(found.content))}
    part = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range") or "")
    if not part or not (part[1] or part[2]):
        return Answer(found.content, 200, headers)
    size = len(found.content)
    first = int(part[1]) if part[1] else max(size - int(part[2]), 0)
    last = min(int(part[2]), size - 1) if part[1] and part[2] else size - 1
    if first > last:
        raise Refused(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
    return Answer(found.content[first : last + 1], 206, headers | {"Content-Range": f"bytes {first}-{last}/{size}"})


@route("GET", "/api/{kind}/{name}/auth-check")
def auth_check(request: Request, kind: str, name: str) -> Answer:
    request.readable(kind, name, files=True)
    return Answer.of({})


@route("GET", "/api/{kind}/{name}(?:/revision/{rev})?")
def info(request: Request, kind: str, name: str, rev: str | None) -> Answer:
    """What is known of a commit; sizes and blobs of its files where they are asked for."""
    repository = request.readable(kind, name)
    facts = describe(repository, repository.resolve(rev or "main"), blobs=request.flag("blobs"))
    if expand := request.query.get("expand") or request.query.get("expand[]"):
        facts = {key: value for key, value in facts.items() if key in (*expand, "_id", "id")}
    return Answer.of(facts)


def describe(repository: Repository, sha: str, blobs: bool) -> dict[str, Any]:
    files = repository.commits[sha].files
    card = read_card(files.get("README.md"))
    facts: dict[str, Any] = {
        "_id": sha[:24],
        "id": repository.name,
        "author": repository.owner,
        "sha": sha,
        "createdAt": DATE,
        "lastModified": DATE,
        "private": repository.private,
        "gated": repository.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": tags(card),
        "cardData": card,
        "siblings": [sibling(path, file, blobs) for path, file in sorted(files.items())],
    }
    facts |= {key: card[key] for key in ("library_name", "pipeline_tag", "model-index") if key in card}
    if repository.kind == "models" and "config.json" in files:
        facts["config"] = read_config(files["config.json"])
    if repository.kind == "spaces":
        facts["sdk"] = repository.sdk
    return facts


def sibling(path: str, file: File, blobs: bool) -> dict[str, Any]:
    if not blobs:
        return {"rfilename": path}
    found = entry(path, file)
    facts = {"rfilename": path, "size": found["size"], "blobId": found["oid"]}
    return facts | ({"lfs": {**found["lfs"], "sha256": file.sha256}} if file.lfs else {})


def read_card(file: File | None) -> dict[str, Any]:
    """The front matter of a card that is in a repository; of one that nobody checked it may say nothing."""
    try:
        data = metadata(file.content.decode()) if file else None
    except (yaml.YAMLError, UnicodeDecodeError):
        return {}
    return json.loads(json.dumps(data, default=str)) if isinstance(data, dict) else {}  # dates are no JSON


def read_config(file: File) -> dict[str, Any]:
    try:
        config = json.loads(file.content)
    except ValueError:
        return {}
    return {key: config[key] for key in ("architectures", "model_type") if key in config}


def tags(card: dict[str, Any]) -> list[str]:
    """The tags that a model is found by: its own, and those that its card's other fields say."""

    def values(key: str) -> list[str]:
        value = card.get(key, [])
        return value if isinstance(value, list) else [value]

    found = [*values("library_name"), *values("tags"), *values("pipeline_tag")]
    found += [f"{kind}:{value}" for kind, key in (("dataset", "datasets"), ("license", "license")) for value in values(key)]
    relation = card.get("base_model_relation")
    found += [f"base_model:{form}{base}" for base in values("base_model") for form in ("", f"{relation}:") if form != "None:"]
    return list(dict.fromkeys(found))


@route("GET", "/api/{kind}/{name}/tree/{rev}(?:/{path})?")
def tree(request: Request, kind: str, name: str, rev: str, path: str | None) -> Answer:
    below = unquote(path or "").rstrip("/")
    prefix = f"{below}/" if below else ""
    files = request.readable(kind, name).files(rev)
    listed = [folder(p) for p in sorted(folders(files))] + [entry(p, f) for p, f in sorted(files.items())]
    deep = request.flag("recursive")
    listed = [e for e in listed if e["path"].startswith(prefix) and (deep or "/" not in e["path"][len(prefix) :])]
    if below and not listed:
        raise Refused(404, f"{below} does not exist", "EntryNotFound")
    return Answer.of(listed)


def folder(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}


@route("POST", "/api/{kind}/{name}/paths-info/{rev}")
def paths_info(request: Request, kind: str, name: str, rev: str) -> Answer:
    files = request.readable(kind, name).files(rev)
    form = "urlencoded" in (request.headers.get("Content-Type") or "")
    paths = parse_qs(request.body.decode()).get("paths", []) if form else request.json.get("paths", [])
    known = folders(files)
    return Answer.of([entry(p, files[p]) for p in paths if p in files] + [folder(p) for p in paths if p in known])


@route("GET", "/api/{kind}/{name}/refs")
def refs(request: Request, kind: str, name: str) -> Answer:
    repository = request.readable(kind, name)
    branches = {ref: sha for ref, sha in repository.refs.items() if not ref.startswith("refs/")}
    requests = {ref: sha for ref, sha in repository.refs.items() if ref.startswith("refs/pr/")}

    def listed(found: dict[str, str], prefix: str) -> list[dict[str, str]]:
        return [{"name": ref, "ref": prefix + ref, "targetCommit": sha} for ref, sha in found.items()]

    facts = {"branches": listed(branches, "refs/heads/"), "tags": listed(repository.tags, "refs/tags/"), "converts": []}
    return Answer.of(facts | ({"pullRequests": listed(requests, "")} if request.flag("include_prs") else {}))


@route("GET", "/api/{kind}/{name}/commits/{rev}")
def commits(request: Request, kind: str, name: str, rev: str) -> Answer:
    history = request.readable(kind, name).history(rev)
    return Answer.of(
        [
            {"id": sha, "title": c.title, "message": c.message, "date": DATE, "authors": [{"user": c.author or name.split("/")[0]}]}
            for sha, c in history
        ]
    )
