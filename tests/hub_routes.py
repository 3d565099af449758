"""How a request to the Hub of the tests finds its route, and who may read and write what."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.message import Message
from typing import TYPE_CHECKING, Any

from hub_store import Refused, Repository

if TYPE_CHECKING:
    from hub_server import Hub

PLACES = {
    "kind": "models|datasets|spaces",
    "name": "[^/]+/[^/]+",
    "rev": "refs(?:/|%2[Ff])(?:pr|heads)(?:/|%2[Ff])[^/]+|[^/]+",
    "num": r"\d+",
    "one": "[^/]+",
    "path": ".+",
}
NO_LOGIN = "Invalid username or password."


@dataclass(frozen=True)
class Account:
    """Who a token belongs to, and whether it may write."""

    user: str
    role: str = "write"  # or "read"
    organizations: tuple[str, ...] = ()

    def owns(self, namespace: str) -> bool:
        return namespace in (self.user, *self.organizations)


def account_of(hub: Hub, header: str | None) -> Account | None:
    """Who an `Authorization` header names; None without one.

    Raises:
        Refused: the token is unknown. The Hub then refuses what everyone may read, too.
    """
    if header is None:
        return None
    account = hub.tokens.get(header.removeprefix("Bearer "))
    if account is None or not header.startswith("Bearer "):
        raise Refused(401, "Invalid credentials in Authorization header")
    return account


@dataclass(frozen=True)
class Request:
    """A request that was received in full."""

    hub: Hub
    verb: str
    path: str
    query: Mapping[str, list[str]]
    headers: Message
    body: bytes
    account: Account | None  # None without a token

    def flag(self, name: str) -> bool:
        return self.query.get(name, ["false"])[0].lower() in ("1", "true")

    @property
    def json(self) -> dict[str, Any]:
        """The JSON object that was sent.

        Raises:
            Refused: it is none.
        """
        try:
            found = json.loads(self.body or b"{}")
        except ValueError as error:
            raise Refused(400, f"The request is no JSON: {error}") from error
        if not isinstance(found, dict):
            raise Refused(400, "The request must be a JSON object")
        return found

    def writer(self) -> Account:
        """Who asks, with a token that may write.

        Raises:
            Refused: there is no token, or it may only read.
        """
        account = self.account
        if account is None:
            raise Refused(401, NO_LOGIN)
        if account.role != "write":
            raise Refused(403, "Forbidden: you must use a write token to upload to a repository.")
        return account

    def readable(self, kind: str, name: str, files: bool = False) -> Repository:
        """The repository, for one who may see it and, where `files` are asked for, read them.

        Raises:
            Refused: there is none, or none for this account: which of the two, the Hub does not tell.
        """
        account = self.account
        repository = self.hub.repositories.get((kind, name))
        owner = account is not None and repository is not None and account.owns(repository.owner)
        if repository is None or (repository.private and not owner):
            raise Refused(404 if account else 401, "Repository not found" if account else NO_LOGIN, "RepoNotFound")
        if files and repository.gated and not owner and (account is None or account.user not in repository.granted):
            message = f"Access to {kind.removesuffix('s')} {name} is restricted"
            raise Refused(403 if account else 401, f"{message}: you must have access to it and be authenticated", "GatedRepo")
        return repository

    def writable(self, kind: str, name: str, pull_request: bool = False) -> tuple[Repository, Account]:
        """The repository and the account, for one who may write to it; everyone may open a pull request.

        Raises:
            Refused: the account may not, or there is no such repository.
        """
        account = self.writer()
        repository = self.readable(kind, name)
        if not pull_request and not account.owns(repository.owner):
            raise Refused(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return repository, account


@dataclass(frozen=True)
class Answer:
    """What is sent back."""

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
        """An answer of JSON."""
        return cls(json.dumps(content).encode(), status, {"Content-Type": "application/json", **(headers or {})})


Route = Callable[..., Answer]
ROUTES: list[tuple[str, re.Pattern[str], Route]] = []


def route(verb: str, pattern: str) -> Callable[[Route], Route]:
    """Call the function for requests to this path; what stands in braces is passed to it, as it was sent."""
    regex = re.sub(r"\{(\w+)\}", lambda found: f"(?P<{found[1]}>{PLACES[found[1]]})", pattern)

    def register(function: Route) -> Route:
        ROUTES.append((verb, re.compile(regex), function))
        return function

    return register


def answer(request: Request) -> Answer:
    """Do what a request asks for.

    Raises:
        Refused: there is no such route, or the route refuses it.
    """
    verb = "GET" if request.verb == "HEAD" else request.verb
    for known, pattern, function in ROUTES:
        found = pattern.fullmatch(request.path)
        if found and known == verb:
            return function(request, **found.groupdict())
    raise Refused(404, f"no route {request.verb} {request.path}")
