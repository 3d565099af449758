"""What the Hub of the tests refuses: one bad request for each rule, sent without the client where that would not send it."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pytest
from hub_cards_check import check_card
from hub_server import OTHER_TOKEN, READ_TOKEN, TOKEN, Hub

WEIGHTS = bytes(range(256))
OID = hashlib.sha256(WEIGHTS).hexdigest()


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def ask(hub: Hub, verb: str, path: str, content: Any = None, token: str | None = TOKEN, **headers: str) -> Reply:
    """One request by hand; what is no bytes is sent as JSON."""
    connection = http.client.HTTPConnection(urlsplit(hub.endpoint).netloc, timeout=30)
    body = content if content is None or isinstance(content, bytes) else json.dumps(content).encode()
    connection.request(verb, path, body, headers | ({"Authorization": f"Bearer {token}"} if token else {}))
    reply = connection.getresponse()
    found = Reply(reply.status, reply.headers, reply.read())
    connection.close()
    return found


@pytest.fixture
def model(hub: Hub) -> str:
    """The API's path of a model whose main branch has one commit."""
    assert ask(hub, "POST", "/api/repos/create", {"name": "model"}).status == 200
    return "/api/models/me/model"


def lines(*operations: tuple[str, dict[str, Any]], **header: Any) -> bytes:
    rows = [("header", {"summary": "A commit", "description": ""} | header), *operations]
    return b"".join(json.dumps({"key": k, "value": v}).encode() + b"\n" for k, v in rows)


def regular(path: str, content: bytes = b"text") -> tuple[str, dict[str, Any]]:
    return "file", {"path": path, "encoding": "base64", "content": base64.b64encode(content).decode()}


def large(**value: Any) -> tuple[str, dict[str, Any]]:
    return "lfsFile", {"path": "w.bin", "algo": "sha256", "oid": OID, "size": len(WEIGHTS)} | value


def uploaded(hub: Hub) -> str:
    """Where the Hub wants `WEIGHTS`."""
    asked = {"operation": "upload", "transfers": ["basic"], "objects": [{"oid": OID, "size": len(WEIGHTS)}], "hash_algo": "sha256"}
    reply = ask(hub, "POST", "/me/model.git/info/lfs/objects/batch", asked)
    return reply.json["objects"][0]["actions"]["upload"]["href"].removeprefix(hub.endpoint)


WRITES = [
    ("POST", "/api/repos/create", {"name": "new"}),
    ("DELETE", "/api/repos/delete", {"name": "model", "organization": "me"}),
    ("PUT", "/api/models/me/model/settings", {"private": True}),
    ("POST", "/api/models/me/model/preupload/main", {"files": []}),
    ("POST", "/api/models/me/model/commit/main", lines(regular("a.txt"))),
    ("POST", "/api/models/me/model/commit/main?create_pr=1", lines(regular("a.txt"))),
    ("POST", "/me/model.git/info/lfs/objects/batch", {"operation": "upload", "objects": [], "ref": {"name": "main"}}),
    ("POST", "/api/models/me/model/branch/dev", {}),
    ("POST", "/api/models/me/model/tag/main", {"tag": "v1"}),
    ("POST", "/api/models/me/model/discussions", {"title": "A title", "pullRequest": True}),
    ("POST", "/api/collections", {"title": "A title", "namespace": "me"}),
]


@pytest.mark.parametrize(("verb", "path", "content"), WRITES)
def test_writing_needs_a_token_that_may_write(verb: str, path: str, content: Any, hub: Hub, model: str) -> None:
    before = dict(hub.repositories["models", "me/model"].refs)
    for token, status in ((None, 401), ("hf_unknown", 401), (READ_TOKEN, 403)):
        assert ask(hub, verb, path, content, token).status == status, token
    assert hub.repositories["models", "me/model"].refs == before
    assert list(hub.repositories) == [("models", "me/model")]
    assert ask(hub, verb, path, content).status == 200


@pytest.mark.parametrize(("verb", "path", "content"), [w for w in WRITES[1:] if "create_pr" not in w[1] and "/discussions" not in w[1]])
def test_of_another_user_only_pull_requests_are_taken(verb: str, path: str, content: Any, hub: Hub, model: str) -> None:
    assert ask(hub, verb, path, content, OTHER_TOKEN).status == 403
    assert ask(hub, "POST", f"{model}/commit/main?create_pr=1", lines(regular("a.txt")), OTHER_TOKEN).status == 200
    assert ask(hub, "POST", f"{model}/commit/refs%2Fpr%2F1", lines(regular("b.txt")), OTHER_TOKEN).status == 200


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        ({"name": "new", "organization": "another"}, 403),
        ({"name": "new", "type": "thing"}, 400),
        ({"name": "a/b"}, 400),
        ({"name": "a--b"}, 400),
        ({}, 400),
        ({"name": 1}, 400),
        ({"name": "new", "type": "space"}, 400),
        ({"name": "new", "type": "space", "sdk": "flask"}, 400),
        ({"name": "new", "visibility": "secret"}, 400),
        ({"name": "model"}, 409),
    ],
)
def test_repositories_that_are_not_made(asked: dict[str, str], status: int, hub: Hub, model: str) -> None:
    reply = ask(hub, "POST", "/api/repos/create", asked)
    assert reply.status == status
    assert status != 409 or reply.json["url"] == f"{hub.endpoint}/me/model"


@pytest.mark.parametrize("path", ["", "/a", "a/", "a//b", ".", "./a", "..", "../a", "a/../b", "a\0b", ".git/config", 1, None])
def test_paths_that_leave_the_repository(path: Any, hub: Hub, model: str) -> None:
    for operation in (regular(path), large(path=path), ("deletedFile", {"path": path})):
        assert ask(hub, "POST", f"{model}/commit/main", lines(operation)).status == 400
    assert ask(hub, "POST", f"{model}/preupload/main", {"files": [{"path": path, "size": 1, "sample": ""}]}).status == 400


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (lines(regular("a.txt"), summary=""), 400, "needs a summary"),
        (lines(regular("a.txt"), summary=None), 400, "needs a summary"),
        (lines(regular("a.txt")).split(b"\n", 1)[1], 400, "must be its header"),
        (b"", 400, "must be its header"),
        (b"{", 400, "no newline-delimited JSON"),
        (b"[1]\n", 400, "no newline-delimited JSON"),
        (lines(("rename", {"path": "a.txt"})), 400, "Unknown operation"),
        (lines(("file", {"path": "a.txt", "content": "text"})), 400, "must be Base64"),
        (lines(("file", {"path": "a.txt", "content": "?", "encoding": "base64"})), 400, "must be Base64"),
        (lines(regular("a.txt", b"a" * (10 * 2**20 + 1))), 400, "larger than 10 MiB"),
        (lines(regular("model.safetensors")), 400, "must be uploaded as large files"),
        (lines(regular("a.txt", b"\0")), 400, "must be uploaded as large files"),
        (lines(regular("a.txt", b"\xff")), 400, "must be uploaded as large files"),
        (lines(large()), 400, "does not exist"),
        (lines(large(algo="md5")), 400, "does not exist"),
        (lines(("deletedFile", {"path": "none.txt"})), 404, "doesn't exist"),
        (lines(("deletedFolder", {"path": "none/"})), 404, "doesn't exist"),
        (lines(regular("a"), regular("a/b")), 400, "Both a file and a folder"),
        (lines(regular("a.txt"), parentCommit="0" * 40), 412, "A commit has happened since"),
        (lines(regular("README.md", b"---\nlicense: mine\n---\n")), 400, "Invalid metadata in README.md"),
    ],
)
def test_commits_that_are_refused(body: bytes, status: int, message: str, hub: Hub, model: str) -> None:
    """Nothing of such a commit is done."""
    before = hub.repositories["models", "me/model"].refs["main"]
    reply = ask(hub, "POST", f"{model}/commit/main", body)
    assert (reply.status, message in reply.json["error"]) == (status, True), reply.json
    assert message in reply.headers["X-Error-Message"]
    assert hub.repositories["models", "me/model"].refs["main"] == before


@pytest.mark.parametrize("ref", ["none", "0" * 40, "refs%2Fpr%2F1"])
def test_commits_need_a_branch(ref: str, hub: Hub, model: str) -> None:
    reply = ask(hub, "POST", f"{model}/commit/{ref}", lines(regular("a.txt")))
    assert (reply.status, reply.headers["X-Error-Code"]) == (404, "RevisionNotFound")


def test_what_a_commit_may_hold(hub: Hub, model: str) -> None:
    """The bounds of the rules above: 10 MiB of text, an empty file of any name."""
    repository = hub.repositories["models", "me/model"]
    body = lines(regular("a.txt", b"a" * 10 * 2**20), regular("empty.bin", b""), regular("é.txt", "é".encode()))
    assert ask(hub, "POST", f"{model}/commit/main", body).status == 200
    assert set(repository.files("main")) == {".gitattributes", "a.txt", "empty.bin", "é.txt"}


def test_large_files_are_what_they_are_said_to_be(hub: Hub, model: str) -> None:
    href = uploaded(hub)
    assert ask(hub, "PUT", f"/lfs/{OID}", WEIGHTS, None).status == 403, "without a signature"
    assert ask(hub, "PUT", href.replace(OID, "0" * 64), WEIGHTS, None).status == 403, "with that of another file"
    for wrong in (WEIGHTS[:-1], WEIGHTS + b"\0", WEIGHTS[::-1], b""):
        assert ask(hub, "PUT", href, wrong, None).status == 400
    assert ask(hub, "POST", f"{model}/commit/main", lines(large())).status == 400, "was not uploaded"
    assert ask(hub, "PUT", href, WEIGHTS, None).status == 200
    assert ask(hub, "POST", f"{model}/commit/main", lines(large(size=1))).status == 400
    assert ask(hub, "POST", f"{model}/commit/main", lines(large())).status == 200
    assert ask(hub, "POST", "/api/repos/create", {"name": "other"}).status == 200
    assert ask(hub, "POST", "/api/models/me/other/commit/main", lines(large())).status == 400, "is in another repository"


@pytest.mark.parametrize("item", [{"oid": "abc", "size": 1}, {"oid": OID}, {"oid": OID, "size": 0}, {}])
def test_objects_that_are_none(item: dict[str, Any], hub: Hub, model: str) -> None:
    assert ask(hub, "POST", "/me/model.git/info/lfs/objects/batch", {"operation": "upload", "objects": [item]}).status == 422


@pytest.mark.parametrize(
    ("header", "status", "part"),
    [
        ("bytes=0-3", 206, b"abcd"),
        ("bytes=4-", 206, b"efghij"),
        ("bytes=-2", 206, b"ij"),
        ("bytes=8-99", 206, b"ij"),
        ("bytes=10-", 416, None),
        ("lines=1-2", 200, b"abcdefghij"),
    ],
)
def test_parts_of_a_file(header: str, status: int, part: bytes | None, hub: Hub, model: str) -> None:
    assert ask(hub, "POST", f"{model}/commit/main?create_pr=1", lines(regular("a b.txt", b"abcdefghij"))).status == 200
    path = "/me/model/resolve/refs%2Fpr%2F1/a%20b.txt"
    head = ask(hub, "HEAD", path)
    assert (head.status, head.headers["Content-Length"], head.body) == (200, "10", b"")
    assert head.headers["X-Repo-Commit"] == hub.repositories["models", "me/model"].refs["refs/pr/1"]
    reply = ask(hub, "GET", path, Range=header)
    assert reply.status == status
    assert part is None or reply.body == part


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        ({"title": "", "namespace": "me"}, 400),
        ({"title": "a" * 60, "namespace": "me"}, 400),
        ({"title": "Title", "description": "a" * 151}, 400),
        ({"title": "Title", "namespace": "another"}, 403),
    ],
)
def test_collections_that_are_not_made(asked: dict[str, str], status: int, hub: Hub) -> None:
    assert ask(hub, "POST", "/api/collections", asked).status == status


def index(**result: Any) -> str:
    whole = {"task": {"type": "t"}, "dataset": {"type": "d", "name": "D"}, "metrics": [{"type": "accuracy", "value": 0.5}]} | result
    return "model-index: " + json.dumps([{"name": "m", "results": [whole]}])


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("[a]", "must be a mapping"),
        ("a: [", "invalid YAML"),
        ("license: mit\nlicense: mit", "duplicated mapping key"),
        ("license: mine", '"license" must be one of'),
        ("license: [mit, mine]", '"license" must be one of'),
        ("tags: a", '"tags" must be an array'),
        ("tags: [1]", '"tags" must be an array'),
        ("language: EN", "lowercase"),
        ("base_model: /home/me/model", '"base_model"'),
        ("base_model: ./model", '"base_model"'),
        ("base_model: [some-org/model, a/b/c]", '"base_model"'),
        ("base_model: 1", '"base_model"'),
        ("base_model_relation: repaired", '"base_model_relation" must be one of'),
        ("library_name: [timm]", '"library_name" must be a string'),
        ("pipeline_tag: backdoor-removal", '"pipeline_tag" must be one of'),
        ("datasets: some-org/digits", '"datasets" must be an array'),
        ("datasets: [/tmp/digits]", '"datasets" with value'),
        ("model-index: {name: m}", '"model-index" must be an array'),
        ("model-index: [{results: []}]", 'name" is required'),
        ("model-index: [{name: m}]", 'results" must be an array'),
        (index(task={}), 'task.type" is required'),
        (index(dataset={"name": "D"}), 'dataset.type" is required'),
        (index(dataset={"type": "d"}), 'dataset.name" is required'),
        (index(metrics=[]), "at least one metric"),
        (index(metrics=[{"value": 1}]), 'type" is required'),
        (index(metrics=[{"type": "accuracy", "value": "97 %"}]), 'value" must be a number'),
        (index(metrics=[{"type": "accuracy", "value": True}]), 'value" must be a number'),
        (index(metrics=[{"type": "accuracy"}]), 'value" must be a number'),
        (index().replace("0.5", ".nan"), 'value" must be a number'),
    ],
)
def test_metadata_that_is_refused(metadata: str, message: str, hub: Hub) -> None:
    card = f"---\n{metadata}\n---\n# Card\n"
    reply = ask(hub, "POST", "/api/validate-yaml", {"content": card, "repoType": "model"}, None)
    assert reply.status == 400
    assert [message in error["message"] for error in reply.json["errors"]] == [True], reply.json
    assert reply.json["warnings"] == []


@pytest.mark.parametrize(
    ("metadata", "kind"),
    [
        (index(), "model"),
        ("license: apache-2.0\nbase_model: [some-org/a, gpt2]\nbase_model_relation: merge\nlanguage: [en, de]", "model"),
        ("sdk: gradio\ncolorFrom: red\ndatasets: [anything goes]", "space"),
        ("license: [mit, cc-by-4.0]\npretty_name: Digits", "dataset"),
    ],
)
def test_metadata_that_is_taken(metadata: str, kind: str) -> None:
    assert check_card(f"---\n{metadata}\n---\n", kind) == ([], [])


@pytest.mark.parametrize("metadata", ["sdk: flask", "colorFrom: orange", f"short_description: {'a' * 61}"])
def test_metadata_of_a_space_that_is_refused(metadata: str) -> None:
    assert check_card(f"---\n{metadata}\n---\n", "space")[0]


@pytest.mark.parametrize("path", ["/api/none", "/api/models/me/model/none", "/api/things/me/model"])
def test_what_is_not_served(path: str, hub: Hub, model: str) -> None:
    assert ask(hub, "GET", path).status == 404
