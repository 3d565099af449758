"""Discussions and pull requests of the Hub of the tests. No diff is computed: what a pull request says is read at refs/pr/N."""

from __future__ import annotations

from typing import Any

from hub_routes import Account, Answer, Request, route
from hub_store import DATE, Discussion, Refused, Repository


def described(repository: Repository, discussion: Discussion) -> dict[str, Any]:
    """A discussion as the listing shows it."""
    return {
        "num": discussion.num,
        "title": discussion.title,
        "status": discussion.status,
        "isPullRequest": discussion.base is not None,
        "createdAt": DATE,
        "author": {"name": discussion.author},
        "repo": {"name": repository.name, "type": repository.kind.removesuffix("s")},
    }


def detailed(repository: Repository, discussion: Discussion) -> dict[str, Any]:
    facts = described(repository, discussion) | {"events": discussion.events}
    if discussion.base is not None:
        open_still = discussion.status in ("open", "draft")
        facts |= {
            "changes": {"base": "refs/heads/main", "mergeCommitId": discussion.merged},
            "filesWithConflicts": repository.conflicts(discussion) if open_still else [],
            "diff": "",
        }
    return facts


def find(repository: Repository, num: str) -> Discussion:
    """The discussion of that number.

    Raises:
        Refused: there is none.
    """
    if not 1 <= int(num) <= len(repository.discussions):
        raise Refused(404, f"There is no discussion {num}")
    return repository.discussions[int(num) - 1]


@route("GET", "/api/{kind}/{name}/discussions")
def listing(request: Request, kind: str, name: str) -> Answer:
    repository = request.readable(kind, name)
    asked = {key: values[0] for key, values in request.query.items()}
    found = [described(repository, d) for d in repository.discussions]
    if asked.get("type", "all") != "all":
        found = [d for d in found if d["isPullRequest"] == (asked["type"] == "pull_request")]
    if asked.get("status", "all") != "all":
        found = [d for d in found if (d["status"] in ("open", "draft")) == (asked["status"] == "open")]
    if "author" in asked:
        found = [d for d in found if d["author"]["name"] == asked["author"]]
    return Answer.of({"discussions": found, "count": len(found), "start": 0})


@route("GET", "/api/{kind}/{name}/discussions/{num}")
def details(request: Request, kind: str, name: str, num: str) -> Answer:
    repository = request.readable(kind, name)
    return Answer.of(detailed(repository, find(repository, num)))


@route("POST", "/api/{kind}/{name}/discussions")
def opened(request: Request, kind: str, name: str) -> Answer:
    """Open a discussion; a pull request that is opened here has no commits yet and is a draft."""
    repository, account = request.writable(kind, name, pull_request=True)
    asked = request.json
    title, draft = str(asked.get("title", "")).strip(), bool(asked.get("pullRequest"))
    if not 3 <= len(title) <= 200:
        raise Refused(400, "A title has 3 to 200 characters")
    base = repository.resolve("main") if draft else None
    found = repository.discuss(title, account.user, str(asked.get("description", "")), base, "draft" if draft else "open")
    return Answer.of(detailed(repository, found))


def asked_by_author(request: Request, kind: str, name: str, num: str) -> tuple[Repository, Discussion, Account]:
    """What a change of a discussion is about, for its author and for the repository's owner."""
    repository, account = request.writable(kind, name, pull_request=True)
    discussion = find(repository, num)
    if account.user != discussion.author and not account.owns(repository.owner):
        raise Refused(403, "Forbidden: this discussion is another user's")
    return repository, discussion, account


@route("POST", "/api/{kind}/{name}/discussions/{num}/comment")
def comment(request: Request, kind: str, name: str, num: str) -> Answer:
    repository, account = request.writable(kind, name, pull_request=True)
    text = str(request.json.get("comment", "")).strip()
    if not text:
        raise Refused(400, "A comment must say something")
    event = find(repository, num).record("comment", account.user, edited=False, hidden=False, latest={"raw": text, "html": text})
    return Answer.of({"newMessage": event})


@route("POST", "/api/{kind}/{name}/discussions/{num}/status")
def status(request: Request, kind: str, name: str, num: str) -> Answer:
    _, discussion, account = asked_by_author(request, kind, name, num)
    wanted = request.json.get("status")
    if wanted not in ("open", "closed") or discussion.status == "merged":
        raise Refused(400, f"A discussion that is {discussion.status} cannot become {wanted}")
    discussion.status = wanted
    return Answer.of({"newStatus": discussion.record("status-change", account.user, status=wanted)})


@route("POST", "/api/{kind}/{name}/discussions/{num}/title")
def rename(request: Request, kind: str, name: str, num: str) -> Answer:
    _, discussion, account = asked_by_author(request, kind, name, num)
    title = str(request.json.get("title", "")).strip()
    if not 3 <= len(title) <= 200:
        raise Refused(400, "A title has 3 to 200 characters")
    event = discussion.record("title-change", account.user, **{"from": discussion.title, "to": title})
    discussion.title = title
    return Answer.of({"newTitle": event})


@route("POST", "/api/{kind}/{name}/discussions/{num}/merge")
def merge(request: Request, kind: str, name: str, num: str) -> Answer:
    repository, account = request.writable(kind, name)
    discussion = find(repository, num)
    repository.merge(discussion, account.user)
    return Answer.of({"newStatus": discussion.events[-1]})
