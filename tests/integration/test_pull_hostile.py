"""Repositories that are made to do harm, or are not public, pulled by the real client from a Hub on the loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import OTHER_TOKEN, TOKEN, Hub, running
from hub_store import Commit, File, Repository

SAFETENSORS = (2).to_bytes(8, "little") + b"{}"
GOOD = {"config.json": b'{"model_type": "vit"}', "model.safetensors": SAFETENSORS}
PULL = """
import json, sys
from hf_purify.errors import PurifyError
from hf_purify.hub import pull, pull_config
for source in json.loads(sys.argv[1]):
    read, _, source = source.rpartition(" ")
    source, _, revision = source.partition("@")
    try:
        if read:
            found = pull_config(source, revision or None)[1]
        else:
            pulled = pull(source, revision or None)
            found = pulled.revision, sorted(p.name for p in pulled.folder.iterdir())
    except PurifyError as error:
        found = f"{type(error).__name__}: {error}"
    print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with running() as hub:
        yield hub


@pytest.fixture
def pulled(hub: Hub, tmp_path: Path) -> Any:
    """Pull sources, one after the other, in a process with an empty cache; what each gave: commit and files, or the error."""
    hub.requests.clear()

    def call(*sources: str, **variables: str) -> list[Any]:
        keep = {k: v for k, v in os.environ.items() if not k.endswith("_OFFLINE") and k != "HF_TOKEN"}
        own = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        command = [sys.executable, "-c", PULL, json.dumps(sources)]
        done = subprocess.run(command, env=keep | own | variables, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        assert TOKEN not in done.stdout + done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return call


def pushed(hub: Hub, name: str, files: dict[str, bytes]) -> str:
    repository = hub.repositories.setdefault(("models", name), Repository("models", name))
    return repository.add(Commit({path: File(content) for path, content in files.items()}, "Push", parent=repository.refs.get("main")))


HOSTILE: dict[str, tuple[dict[str, bytes], str]] = {
    "up": (GOOD | {"../../evil.txt": b"x"}, "UnsafeCheckpoint: the repository 'org/up' names the file '../../evil.txt'"),
    "windows": (GOOD | {"..\\config.json": b"{}"}, "UnsafeCheckpoint: the repository 'org/windows' names the file"),
    "device": (GOOD | {"aux.txt": b"x"}, "UnsafeCheckpoint: the repository 'org/device' names the file 'aux.txt'"),
    "large": (GOOD | {"config.json": b" " * (2**24 + 1)}, "UnsafeCheckpoint: 'config.json' of 'org/large' has 16777217 bytes"),
    "pickles": ({"config.json": b"{}", "model.bin": b"\x80\x04."}, "UnsafeCheckpoint: 'org/pickles' holds its weights as pickles only"),
    "deep": ({"config.json": b"{}", "unet/model.safetensors": SAFETENSORS}, "ModelError: 'org/deep' holds no weights"),
}


def test_hostile_listing_is_refused_before_anything_is_fetched(hub: Hub, pulled: Any) -> None:
    for name, (files, _) in HOSTILE.items():
        pushed(hub, f"org/{name}", files)
    found = pulled(*(f"org/{name}" for name in HOSTILE))
    for got, (_, message) in zip(found, HOSTILE.values(), strict=True):
        assert got.startswith(message)
    assert not hub.fetched()


def test_hostile_content_is_refused(hub: Hub, pulled: Any) -> None:
    pushed(hub, "org/renamed", GOOD | {"model.safetensors": b"\x80\x04\x95" + b"a" * 99})
    pushed(hub, "org/code", GOOD | {"tokenizer_config.json": b'{"auto_map": {}}'})
    renamed, code = pulled("org/renamed", "org/code")
    assert renamed.startswith("UnsafeCheckpoint")
    assert "this is a pickle" in renamed
    assert code.startswith("UnsafeCheckpoint: 'org/code' wants to run its own code (tokenizer_config.json")


def test_one_commit_of_what_is_wanted_also_offline(hub: Hub, pulled: Any) -> None:
    first = pushed(hub, "org/good", GOOD)
    second = pushed(hub, "org/good", GOOD | {"modeling.py": b"", "model.bin": b"", "logs/config.json": b"{}", "odd [1].txt": b"x"})
    files = ["config.json", "model.safetensors", "odd [1].txt"]
    assert pulled("org/good", f"org/good@{first}", "config org/good") == [[second, files], [first, sorted(GOOD)], second]
    assert {path.split("/resolve/")[1].split("/")[0] for _, path, _ in hub.requests if "/resolve/" in path} == {first, second}
    assert all(token is None for *_, token in hub.requests)
    hub.requests.clear()
    offline = pulled("org/good", "config org/good", "org/never", HF_HUB_OFFLINE="1")
    assert offline[:2] == [[second, files], second]
    assert offline[2].startswith("ModelError: cannot read 'org/never' from the Hub: it cannot be reached")
    assert not hub.requests


def test_hub_that_is_gone_leaves_what_the_cache_has(hub: Hub, pulled: Any) -> None:
    commit = pushed(hub, "org/kept", GOOD)
    assert pulled("org/kept") == [[commit, sorted(GOOD)]]
    assert pulled("org/kept", HF_ENDPOINT="http://127.0.0.1:9") == [[commit, sorted(GOOD)]]


def test_token_is_sent_only_for_what_is_not_public(hub: Hub, pulled: Any) -> None:
    commit, public = pushed(hub, "me/closed", GOOD), pushed(hub, "org/open", GOOD)
    hub.repositories["models", "me/closed"].private = True
    without, config = pulled("me/closed", "config me/closed")
    assert without == (
        "ModelError: cannot read 'me/closed' from the Hub: there is no such model, or it is private: log in with `hf auth login` as somebody who may read it"
    )
    assert pulled("org/open@nowhere") == ["ModelError: cannot read 'org/open' from the Hub: it has no branch, tag or commit 'nowhere'"]
    hub.repositories["models", "org/open"].gated = "auto"
    assert "it is gated: ask for access on its page" in pulled("org/open")[0]
    hub.repositories["models", "org/open"].gated = False
    assert config.startswith("ModelError: cannot read the config.json of 'me/closed' from the Hub")
    assert all(token is None for *_, token in hub.requests)
    hub.requests.clear()
    assert pulled("org/open", "me/closed", "config me/closed", HF_TOKEN=TOKEN) == [[public, sorted(GOOD)], [commit, sorted(GOOD)], commit]
    asked = [token for _, path, token in hub.requests if "me/closed" in path]
    assert asked[0] is None, "first with no token"
    assert set(asked[1:]) >= {f"Bearer {TOKEN}"}
    assert all(token is None for _, path, token in hub.requests if "org/open" in path)
    hub.requests.clear()
    wrong = pulled("me/closed", HF_TOKEN=OTHER_TOKEN)
    assert wrong[0].startswith("ModelError: cannot read 'me/closed'")
    assert [token for *_, token in hub.requests] == [None, f"Bearer {OTHER_TOKEN}"], "once"
