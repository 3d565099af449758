"""Failures that a test orders from its Hub, and what the client does then: what it tries again, and what it leaves to us."""

from __future__ import annotations

import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_server import TOKEN, Hub
from huggingface_hub import HfApi, constants, file_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import _http

MODEL = "me/model"
WEIGHTS = bytes(range(256)) * 400
BROKEN = _http._DEFAULT_RETRY_ON_EXCEPTIONS  # exceptions of the HTTP library, which is another in older clients


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the client would have waited before it tried again."""
    found: list[float] = []
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", types.SimpleNamespace(sleep=found.append))
    return found


@pytest.fixture
def model(api: HfApi, hub: Hub, tmp_path: Path) -> HfApi:
    """The client, and on the Hub a model with weights."""
    api.create_repo(MODEL)
    upload(api, "old.bin", WEIGHTS[::-1])
    hub.requests.clear()
    return api


def upload(api: HfApi, path: str = "new.bin", content: bytes = WEIGHTS, **options: Any) -> Any:
    return api.upload_file(path_or_fileobj=content, path_in_repo=path, repo_id=MODEL, **options)


def download(api: HfApi, folder: Path) -> bytes:
    return Path(api.hf_hub_download(MODEL, "old.bin", cache_dir=folder)).read_bytes()


def asked(hub: Hub, verb: str, pattern: str) -> int:
    return sum(verb == v and bool(re.search(pattern, path)) for v, path, _ in hub.requests)


Call = Callable[[HfApi, Path], Any]
RETRIED: dict[str, tuple[str, str, Call]] = {
    "preupload": ("POST", "/preupload/main", lambda api, _: upload(api)),
    "batch": ("POST", "/objects/batch", lambda api, _: upload(api)),
    "upload": ("PUT", "^/lfs/", lambda api, _: upload(api)),
    "verify": ("POST", "/objects/verify", lambda api, _: upload(api)),
    "tree": ("GET", "/tree/", lambda api, folder: api.snapshot_download(MODEL, cache_dir=folder)),
}
NOT_RETRIED: dict[str, tuple[str, str, Call]] = {
    "whoami": ("GET", "whoami", lambda api, _: api.whoami()),
    "create": ("POST", "/repos/create", lambda api, _: api.create_repo("me/new")),
    "check": ("POST", "/validate-yaml", lambda api, _: upload(api, "README.md", b"---\nlicense: mit\n---\n")),
    "commit": ("POST", "/commit/main", lambda api, _: upload(api)),
    "pull request": ("POST", "/commit/main", lambda api, _: upload(api, create_pr=True)),
    "draft": ("POST", "/discussions", lambda api, _: api.create_pull_request(MODEL, title="A draft")),
    "collection": ("POST", "/api/collections", lambda api, _: api.create_collection("A title")),
    "info": ("GET", f"/api/models/{MODEL}", lambda api, _: api.model_info(MODEL)),
}


@pytest.mark.parametrize(
    ("status", "headers", "seconds"), [(500, {}, 1), (503, {}, 1), (429, {"Retry-After": "7"}, 8), (503, {"Retry-After": "7"}, 8)]
)
@pytest.mark.parametrize("name", RETRIED)
def test_statuses_that_the_client_tries_again(
    name: str, status: int, headers: dict[str, str], seconds: int, model: HfApi, hub: Hub, waits: list[float], tmp_path: Path
) -> None:
    """After one second, then two, four, eight; with a `Retry-After`, after that and one second more."""
    verb, pattern, call = RETRIED[name]
    hub.fail(verb, pattern, status, headers=headers)
    call(model, tmp_path)
    assert (asked(hub, verb, pattern), waits) == (2, [seconds])


@pytest.mark.parametrize("broken", ["cut", "lose"])
@pytest.mark.parametrize("name", RETRIED)
def test_connections_that_the_client_takes_up_again(
    name: str, broken: str, model: HfApi, hub: Hub, waits: list[float], tmp_path: Path
) -> None:
    verb, pattern, call = RETRIED[name]
    getattr(hub, broken)(verb, pattern)
    call(model, tmp_path)
    assert (asked(hub, verb, pattern), waits) == (2, [1])
    assert "tree" in pattern or hub.repositories["models", MODEL].files("main")["new.bin"].content == WEIGHTS


@pytest.mark.parametrize("status", [401, 403, 404, 409, 412, 429, 500, 503])
@pytest.mark.parametrize("name", NOT_RETRIED)
def test_statuses_that_the_client_raises(name: str, status: int, model: HfApi, hub: Hub, waits: list[float], tmp_path: Path) -> None:
    verb, pattern, call = NOT_RETRIED[name]
    before = dict(hub.repositories["models", MODEL].refs)
    hub.fail(verb, pattern, status, headers={"Retry-After": "7"})
    with pytest.raises(HfHubHTTPError) as raised:
        call(model, tmp_path)
    assert raised.value.response.status_code == status
    assert raised.value.response.headers["Retry-After"] == "7"
    assert (asked(hub, verb, pattern), waits) == (1, [])
    assert hub.repositories["models", MODEL].refs == before
    call(model, tmp_path)


@pytest.mark.parametrize("broken", ["cut", "lose"])
@pytest.mark.parametrize("name", NOT_RETRIED)
def test_connections_whose_end_the_client_raises(
    name: str, broken: str, model: HfApi, hub: Hub, waits: list[float], tmp_path: Path
) -> None:
    """It is then no error of the Hub, but one of the HTTP library."""
    verb, pattern, call = NOT_RETRIED[name]
    getattr(hub, broken)(verb, pattern)
    with pytest.raises(BROKEN):
        call(model, tmp_path)
    assert (asked(hub, verb, pattern), waits) == (1, [])


def test_a_commit_whose_answer_is_lost_was_made(model: HfApi, hub: Hub) -> None:
    """The same push again finds nothing to do on a branch, and opens a second pull request beside the first."""
    hub.lose("POST", "/commit/main", times=2)
    with pytest.raises(BROKEN):
        upload(model)
    head = hub.repositories["models", MODEL].refs["main"]
    assert hub.repositories["models", MODEL].files("main")["new.bin"].content == WEIGHTS
    assert upload(model).oid == head
    with pytest.raises(BROKEN):
        upload(model, content=WEIGHTS[::2], create_pr=True)
    assert upload(model, content=WEIGHTS[::2], create_pr=True).pr_num == 2


def test_a_commit_that_is_cut_was_not_made(model: HfApi, hub: Hub) -> None:
    before = hub.repositories["models", MODEL].refs["main"]
    hub.cut("POST", "/commit/main")
    with pytest.raises(BROKEN):
        upload(model)
    assert hub.repositories["models", MODEL].refs["main"] == before
    hub.requests.clear()
    upload(model, parent_commit=before)
    assert not asked(hub, "PUT", "/lfs/"), "the weights are there already"


def test_an_upload_that_fails_for_good(model: HfApi, hub: Hub, waits: list[float]) -> None:
    """Six times in 23 seconds; the error is then hidden in another."""
    hub.fail("PUT", "^/lfs/", 500, times=6)
    with pytest.raises(RuntimeError, match=r"new\.bin") as raised:
        upload(model)
    assert isinstance(raised.value.__cause__, HfHubHTTPError)
    assert (asked(hub, "PUT", "^/lfs/"), waits) == (6, [1, 2, 4, 8, 8])
    assert not hub.repositories["models", MODEL].objects.keys() - {
        f.sha256 for f in hub.repositories["models", MODEL].files("main").values()
    }


def test_an_upload_that_is_refused(model: HfApi, hub: Hub, waits: list[float]) -> None:
    hub.fail("PUT", "^/lfs/", 403)
    with pytest.raises(RuntimeError, match=r"new\.bin") as raised:
        upload(model)
    assert isinstance(raised.value.__cause__, HfHubHTTPError)
    assert (asked(hub, "PUT", "^/lfs/"), waits) == (1, [])


def test_an_error_page_in_place_of_the_check_of_a_card(model: HfApi, hub: Hub) -> None:
    hub.fail("POST", "/validate-yaml", 502, body=b"<html>Bad gateway</html>")
    with pytest.raises(ValueError, match="Expecting value"):
        upload(model, "README.md", b"---\nlicense: mit\n---\n")


def test_a_download_that_is_cut_goes_on_after_the_last_whole_chunk(
    model: HfApi, hub: Hub, waits: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks are of 10 MB unless it is said otherwise: a smaller file begins anew."""
    ranges, stream = [], file_download.http_stream_backoff

    def recorded(**request: Any) -> Any:
        ranges.append(request["headers"].get("Range"))
        return stream(**request)

    monkeypatch.setattr(file_download, "http_stream_backoff", recorded)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    hub.cut("GET", "/resolve/", times=2)
    assert download(model, tmp_path) == WEIGHTS[::-1]
    assert (ranges, waits) == ([None, "bytes=51200-", "bytes=76800-"], [1, 1])


@pytest.mark.parametrize(("status", "again"), [(429, True), (500, False), (503, False)])
def test_downloads_are_tried_again_when_there_were_too_many(
    status: int, again: bool, model: HfApi, hub: Hub, waits: list[float], tmp_path: Path
) -> None:
    hub.fail("GET", "/resolve/", status, headers={"Retry-After": "7"})
    if again:
        assert download(model, tmp_path) == WEIGHTS[::-1]
    else:
        with pytest.raises(HfHubHTTPError, match=str(status)):
            download(model, tmp_path)
    assert waits == [8] * again


def test_failures_begin_and_end_where_they_are_ordered(model: HfApi, hub: Hub) -> None:
    hub.fail("GET", "whoami", 500, times=2, after=1)
    statuses = []
    for _ in range(5):
        reply = _http.get_session().get(f"{hub.endpoint}/api/whoami-v2", headers={"Authorization": f"Bearer {TOKEN}"})
        statuses.append(reply.status_code)
    assert statuses == [200, 500, 500, 200, 200]


def test_a_slow_answer_comes_after_the_clients_patience(model: HfApi, hub: Hub) -> None:
    hub.slow("GET", f"/api/models/{MODEL}", seconds=0.5)
    with pytest.raises(BROKEN):
        model.model_info(MODEL, timeout=0.1)
    assert model.model_info(MODEL, timeout=30).id == MODEL
