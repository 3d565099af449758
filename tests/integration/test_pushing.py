"""Pushes to a Hub on the loopback that is as strict as the real one, and fails when it is told to: one commit, or nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import OTHER_TOKEN, READ_TOKEN, TOKEN, Hub, running
from papers import output_at, report_of

pytestmark = pytest.mark.slow

Push = Callable[..., dict[str, Any]]


class Pusher:
    """A process that pushes, with a token of its own."""

    def __init__(self, hub: Hub, home: Path, token: str | None) -> None:
        keep = {k: v for k, v in os.environ.items() if not k.endswith("_OFFLINE") and k != "HF_TOKEN"}
        own = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), **({"HF_TOKEN": token} if token else {})}
        script = Path(__file__).parents[1] / "pusher.py"
        self.errors = (home.parent / f"{home.name}.log").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, str(script)], env=keep | own, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )

    def __call__(self, folder: Path, repository: str, **settings: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"folder": str(folder), "repository": repository, "settings": settings}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> str:
        """Ends the process, and gives what it wrote besides."""
        self.process.communicate(timeout=60)
        self.errors.seek(0)
        return self.errors.read()


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with running() as hub:
        yield hub


@pytest.fixture(scope="module")
def push(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Push]:
    pusher = Pusher(hub, tmp_path_factory.mktemp("client") / "home", TOKEN)
    yield pusher
    assert TOKEN not in pusher.close()


@pytest.fixture
def output(tmp_path: Path, hub: Hub) -> Path:
    """A small output folder, and a Hub that fails at nothing."""
    output_at(tmp_path)
    hub.faults.clear()
    hub.requests.clear()
    return tmp_path / "out"


def files_of(hub: Hub, name: str, revision: str = "main") -> dict[str, bytes]:
    return {path: file.content for path, file in hub.repositories["models", name].files(revision).items()}


def commits_of(hub: Hub, name: str) -> int:
    """Commits that somebody made: the one that begins a repository aside."""
    return len(hub.repositories["models", name].history("main")) - 1


def test_a_push_is_one_private_commit_of_what_the_provenance_names(push: Push, hub: Hub, output: Path) -> None:
    (output / "notes.md").write_text("mine")
    answer = push(output, "me/first")["done"]
    repository = hub.repositories["models", "me/first"]
    assert repository.private
    assert commits_of(hub, "me/first") == 1
    assert answer["commit"] == repository.refs["main"]
    found = files_of(hub, "me/first")
    provenance = json.loads(found["provenance.json"])
    assert set(found) - {".gitattributes"} == {*provenance["files"], "README.md", "provenance.json"}
    assert all(found[name] == (output / name).read_bytes() for name in provenance["files"])
    assert "from_pretrained('me/first')" in found["README.md"].decode()
    assert "hf-purify verify me/first" in found["README.md"].decode()


def test_pushing_again_changes_nothing(push: Push, hub: Hub, output: Path) -> None:
    first, second = push(output, "me/twice")["done"], push(output, "me/twice")["done"]
    assert first["commit"] == second["commit"]
    assert commits_of(hub, "me/twice") == 1


def test_public_if_that_is_said(push: Push, hub: Hub, output: Path) -> None:
    push(output, "me/public", private=False)
    assert not hub.repositories["models", "me/public"].private


def test_an_edited_card_is_pushed_as_it_is(push: Push, hub: Hub, output: Path) -> None:
    (output / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    push(output, "me/edited")
    assert files_of(hub, "me/edited")["README.md"] == (output / "README.md").read_bytes()


@pytest.mark.parametrize("card", [None, "no metadata", "---\nbroken: [\n---\n"])
def test_the_repair_alone_has_a_card_of_its_own(card: str | None, push: Push, hub: Hub, output: Path) -> None:
    (output / "README.md").unlink() if card is None else (output / "README.md").write_text(card)
    push(output, "me/own-card", repair_only=True)
    assert "hf-purify apply me/own-card" in files_of(hub, "me/own-card")["README.md"].decode()


def test_a_card_that_the_hub_refuses_is_an_error_and_no_commit(push: Push, hub: Hub, output: Path) -> None:
    (output / "README.md").write_text("---\nbase_model: /not/a/repository\n---\n")
    answer = push(output, "me/badcard")
    assert answer["error"] == "PublishError"
    assert "base_model" in answer["said"]
    assert commits_of(hub, "me/badcard") == 0


def test_a_pull_request_takes_the_old_weights_away(push: Push, hub: Hub, output: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for name in ("pytorch_model.bin", "model-00001-of-00002.safetensors", "README.md", "vocab.txt"):
        (theirs / name).write_text("theirs")
    before = hub.push("models", "some-org/model", theirs)
    done = push(output, "some-org/model", create_pr=True)["done"]
    assert done["pull_request"].endswith("/discussions/1")
    assert done["removed"] == ["model-00001-of-00002.safetensors", "pytorch_model.bin"]
    assert hub.repositories["models", "some-org/model"].refs["main"] == before, "what is there stays until it is merged"
    proposed = files_of(hub, "some-org/model", "refs/pr/1")
    assert {"model.safetensors", "provenance.json", "vocab.txt"} <= set(proposed)
    assert not {"pytorch_model.bin", "model-00001-of-00002.safetensors"} & set(proposed)


def test_a_pull_request_needs_a_repository(push: Push, hub: Hub, output: Path) -> None:
    answer = push(output, "me/nowhere", create_pr=True)
    assert "there is no 'me/nowhere' to open a pull request on" in answer["said"]
    assert ("models", "me/nowhere") not in hub.repositories


def test_the_repair_alone_is_a_few_kilobytes(push: Push, hub: Hub, output: Path) -> None:
    push(output, "me/repair", repair_only=True)
    found = files_of(hub, "me/repair")
    assert "model.safetensors" not in found
    assert "neuron_mask.safetensors" in found
    assert sum(len(v) for k, v in found.items() if not k.startswith("pictures/")) < 20_000
    card, provenance = found["README.md"].decode(), json.loads(found["provenance.json"])
    assert provenance["kind"] == "repair"
    assert f"hf-purify apply me/repair --to some-org/model@{provenance['base']['revision']}" in card
    assert "base_model_relation: adapter" in card


def test_refusals_before_the_hub_is_asked(push: Push, hub: Hub, tmp_path: Path) -> None:
    hub.requests.clear()
    output_at(tmp_path / "victim", kind="victim")
    output_at(tmp_path / "dear", report_of(cost=30))
    for name, said in (("victim", "--backdoored"), ("dear", "more than the tolerance")):
        assert said in push(tmp_path / name / "out", "me/refused")["said"]
    assert not [path for _, path, _ in hub.requests if "me/refused" in path]
    assert "done" in push(tmp_path / "victim" / "out", "me/victim", backdoored=True)
    assert "Backdoored on purpose" in files_of(hub, "me/victim")["README.md"].decode()


# What the Hub does to a request, and what comes of the push: an error that says so, or None where it goes well in the end.
Order = Callable[[Hub], None]
FAILURES: dict[str, tuple[Order, str | None]] = {
    "401 at the door": (lambda h: h.fail("GET", "whoami", 401), "log in with `hf auth login`, or set HF_TOKEN"),
    "403 on making it": (lambda h: h.fail("POST", "repos/create", 403), "your token may not write there"),
    "403 on the commit": (lambda h: h.fail("POST", "/commit/", 403), "your token may not write there"),
    "404 on the commit": (lambda h: h.fail("POST", "/commit/", 404), "there is no such repository"),
    "409 on the commit": (lambda h: h.fail("POST", "/commit/", 409), "exists already, or that someone else is writing"),
    "412 on the commit": (lambda h: h.fail("POST", "/commit/", 412), "someone else has committed"),
    "429 once": (lambda h: h.fail("POST", "/commit/", 429, headers={"Retry-After": "1"}), None),
    "429 on large files": (lambda h: h.fail("PUT", "/lfs/", 429, headers={"Retry-After": "1"}), None),
    "429 for ever": (lambda h: h.fail("POST", "/commit/", 429, times=99, headers={"Retry-After": "0"}), "asks for patience"),
    "500 once": (lambda h: h.fail("POST", "/commit/", 500), None),
    "503 on the list": (lambda h: h.fail("POST", "preupload", 503), None),
    "500 for ever": (lambda h: h.fail("POST", "/commit/", 500, times=99), "the Hub answered 500"),
    "cut on a large file": (lambda h: h.cut("PUT", "/lfs/"), None),
    "cut on the commit": (lambda h: h.cut("POST", "/commit/"), None),
    "the answer is lost": (lambda h: h.lose("POST", "/commit/"), None),
    "cut for ever": (lambda h: h.cut("POST", "/commit/", times=99), "nothing was committed that you would see"),
    "a page of a proxy": (lambda h: h.fail("POST", "validate-yaml", 200, body=b"<html>busy</html>"), None),
    "500 on large files": (lambda h: h.fail("PUT", "/lfs/", 500), None),
    "403 on large files": (lambda h: h.fail("PUT", "/lfs/", 403, times=9), "your token may not write there"),
    "silence": (lambda h: h.slow("POST", "/commit/", 5), None),
    "slow": (lambda h: h.slow("POST", "/commit/", 0.5), None),
}


@pytest.mark.parametrize(("order", "said"), FAILURES.values(), ids=FAILURES)
def test_failures_leave_one_commit_or_none(
    order: Order, said: str | None, push: Push, hub: Hub, output: Path, request: pytest.FixtureRequest
) -> None:
    name = "me/" + re.sub(r"\W+", "-", request.node.callspec.id)
    order(hub)
    answer = push(output, name)
    if said is None:
        assert "done" in answer, answer
    else:
        assert answer["error"] == "PublishError"
        assert said in answer["said"]
        assert ("models", name) not in hub.repositories or commits_of(hub, name) == 0
        hub.faults.clear()
        sent = {path for verb, path, _ in hub.requests if verb == "PUT"}
        hub.requests.clear()
        assert "done" in push(output, name), "the same push goes on"
        again = {path for verb, path, _ in hub.requests if verb == "PUT"}
        assert not sent & again or "large" in name, "what had arrived is not sent twice"
    assert commits_of(hub, name) == 1
    assert set(files_of(hub, name)) >= {"model.safetensors", "README.md", "provenance.json"}


def test_someone_else_commits_in_between(push: Push, hub: Hub, output: Path, tmp_path: Path) -> None:
    """Between the look at the repository and the commit."""
    push(output, "me/busy")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "notes.md").write_text("theirs")
    (tmp_path / "second").mkdir()
    output_at(tmp_path / "second", report_of(cost=1))
    hub.fail("POST", "/commit/", 500)

    def interfere() -> None:
        while not [1 for verb, path, _ in hub.requests if verb == "POST" and "/commit/" in path]:
            time.sleep(0.001)
        hub.push("models", "me/busy", tmp_path / "theirs")

    hub.requests.clear()
    thread = threading.Thread(target=interfere)
    thread.start()
    answer = push(tmp_path / "second" / "out", "me/busy")
    thread.join()
    assert "someone else has committed" in answer["said"]
    assert "notes.md" in files_of(hub, "me/busy")


@pytest.mark.parametrize(
    ("token", "said"),
    [
        (None, "log in with `hf auth login`"),
        ("hf_unknownUnknownUnknown0123", "log in with `hf auth login`"),
        (READ_TOKEN, "your token may not write there"),
        (OTHER_TOKEN, "your token may not write there"),
    ],
)
def test_tokens(token: str | None, said: str, hub: Hub, output: Path, tmp_path: Path) -> None:
    pusher = Pusher(hub, tmp_path / "home", token)
    answer = pusher(output, "me/tokens")
    shown = pusher.close() + json.dumps(answer)
    assert answer["error"] == "PublishError"
    assert said in answer["said"]
    assert ("models", "me/tokens") not in hub.repositories
    assert not token or token not in shown
