"""Collections of the Hub of the tests."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from typing import Any

from hub_routes import Answer, Request, route
from hub_store import DATE, Refused


@dataclass
class Collection:
    """A list of repositories with a title; `slug` is its address."""

    slug: str
    title: str
    owner: str
    private: bool = False
    description: str | None = None
    items: list[dict[str, Any]] = field(default_factory=list)

    def described(self) -> dict[str, Any]:
        facts = {"slug": self.slug, "title": self.title, "description": self.description, "private": self.private, "items": self.items}
        return facts | {"owner": {"name": self.owner, "type": "user"}, "lastUpdated": DATE, "position": 0, "theme": "green", "upvotes": 0}


def text(asked: dict[str, Any], key: str, limit: int) -> str | None:
    """A text of the request.

    Raises:
        Refused: it is too long, or no text.
    """
    value = asked.get(key)
    if value is not None and (not isinstance(value, str) or len(value) > limit):
        raise Refused(400, f'"{key}" must be a text of at most {limit} characters')
    return value


@route("POST", "/api/collections")
def create(request: Request) -> Answer:
    account, asked = request.writer(), request.json
    title, owner = (text(asked, "title", 59) or "").strip(), asked.get("namespace") or account.user
    if not title:
        raise Refused(400, '"title" is required')
    if not account.owns(owner):
        raise Refused(403, f"You don't have the rights to create a collection under the namespace {owner}")
    digest = hashlib.sha256(f"{owner}/{title}".encode()).hexdigest()[:24]
    slug = f"{owner}/{re.sub(r'[^a-z0-9]+', '-', title.lower()).strip('-')}-{digest}"
    if slug in request.hub.collections:
        raise Refused(409, f"You already have a collection with this title: {title}", slug=slug)
    made = Collection(slug, title, owner, bool(asked.get("private")), text(asked, "description", 150))
    request.hub.collections[slug] = made
    return Answer.of(made.described())


def find(request: Request, slug: str) -> Collection:
    """The collection at this address, for one who may see it.

    Raises:
        Refused: there is none, or it is another user's private one.
    """
    account, found = request.account, request.hub.collections.get(slug)
    if found is None or (found.private and not (account and account.owns(found.owner))):
        raise Refused(404, "Collection not found")
    return found


@route("GET", "/api/collections/{name}")
def read(request: Request, name: str) -> Answer:
    return Answer.of(find(request, name).described())


@route("DELETE", "/api/collections/{name}")
def delete(request: Request, name: str) -> Answer:
    account, found = request.writer(), find(request, name)
    if not account.owns(found.owner):
        raise Refused(403, "Forbidden: this collection is another user's")
    del request.hub.collections[name]
    return Answer.of({})


@route("POST", "/api/collections/{name}/items")
def add(request: Request, name: str) -> Answer:
    account, asked, found = request.writer(), request.json, find(request, name)
    if not account.owns(found.owner):
        raise Refused(403, "Forbidden: this collection is another user's")
    item = asked.get("item") or {}
    if item.get("type") not in ("model", "dataset", "space"):
        raise Refused(400, f"Only models, datasets and Spaces are kept here, got {item.get('type')!r}")
    request.readable(f"{item['type']}s", str(item.get("id")))
    if any((i["type"], i["id"]) == (item["type"], item["id"]) for i in found.items):
        raise Refused(409, "Item already in collection")
    note = text(asked, "note", 500)
    facts = {"_id": f"{len(found.items):024}", "id": item["id"], "type": item["type"], "position": len(found.items)}
    found.items.append(facts | ({"note": {"text": note, "html": note}} if note else {}))
    return Answer.of(found.described())
