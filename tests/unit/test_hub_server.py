"""The Hub of the tests by the real client: what is written can be read back, by those who may."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import OTHER_TOKEN, READ_TOKEN, TOKEN, Hub
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

MODEL = "me/model"
CARD = """---
license: mit
base_model: some-org/base
base_model_relation: finetune
library_name: transformers
pipeline_tag: image-classification
tags: [hf-purify]
datasets: [some-org/digits]
model-index:
- name: model
  results:
  - task: {type: image-classification}
    dataset: {type: some-org/digits, name: Digits}
    metrics: [{type: accuracy, value: 0.97}]
---
# A card
"""
WEIGHTS = bytes(range(256)) * 40


def add(path: str, content: bytes) -> CommitOperationAdd:
    return CommitOperationAdd(path, content)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder: text, weights, a text that is too large for git, and a file below a folder."""
    folder = tmp_path / "model"
    (folder / "logs").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "vocab.txt").write_text("word\n" * (11 * 2**20 // 5))
    (folder / "logs" / "empty.bin").write_bytes(b"")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file() and ".cache" not in p.parts}


def test_who_am_i(api: HfApi, hub: Hub) -> None:
    me = api.whoami()
    assert (me["name"], me["auth"]["accessToken"]["role"]) == ("me", "write")
    assert hub.requests == [("GET", "/api/whoami-v2", f"Bearer {TOKEN}")]
    assert api.whoami(READ_TOKEN)["auth"]["accessToken"]["role"] == "read"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api.whoami("hf_unknown")


@pytest.mark.parametrize(("kind", "page"), [("model", MODEL), ("dataset", f"datasets/{MODEL}"), ("space", f"spaces/{MODEL}")])
def test_repositories_come_and_go(kind: str, page: str, api: HfApi, hub: Hub) -> None:
    sdk = {"space_sdk": "gradio"} if kind == "space" else {}
    url = api.create_repo(MODEL, repo_type=kind, private=True, **sdk)
    assert url == f"{hub.endpoint}/{page}"
    assert (url.repo_id, url.repo_type) == (MODEL, kind)
    assert api.create_repo(MODEL, repo_type=kind, exist_ok=True, **sdk) == url
    with pytest.raises(HfHubHTTPError, match="You already created") as error:
        api.create_repo(MODEL, repo_type=kind, **sdk)
    assert error.value.response.status_code == 409
    info = api.repo_info(MODEL, repo_type=kind)
    assert info.private
    assert ".gitattributes" in [s.rfilename for s in info.siblings]
    api.update_repo_settings(MODEL, repo_type=kind, private=False)
    assert not api.repo_info(MODEL, repo_type=kind, token=False).private
    api.delete_repo(MODEL, repo_type=kind)
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo(MODEL, repo_type=kind)


def test_a_folder_is_uploaded_and_comes_back(api: HfApi, hub: Hub, folder: Path, tmp_path: Path) -> None:
    api.create_repo(MODEL)
    done = api.upload_folder(repo_id=MODEL, folder_path=folder, commit_message="All of it")
    snapshot = Path(api.snapshot_download(MODEL, cache_dir=tmp_path / "cache"))
    assert snapshot.name == done.oid
    assert contents(snapshot) == contents(folder) | {
        ".gitattributes": hub.repositories["models", MODEL].files("main")[".gitattributes"].content
    }

    info = api.model_info(MODEL, files_metadata=True)
    files = {s.rfilename: s for s in info.siblings}
    assert {name: f.size for name, f in files.items()} == {name: len(content) for name, content in contents(snapshot).items()}
    assert {name for name, f in files.items() if f.lfs} == {"model.safetensors", "vocab.txt"}, "by its pattern, and by its size"
    assert {s.size for s in api.model_info(MODEL).siblings} == {None}
    assert (info.sha, info.pipeline_tag) == (done.oid, "image-classification")
    assert vars(info)["library_name"] == "transformers"
    assert {"hf-purify", "license:mit", "base_model:finetune:some-org/base"} <= set(info.tags)
    assert info.card_data.eval_results[0].metric_value == 0.97
    assert {e.path for e in api.list_repo_tree(MODEL)} == {*os.listdir(folder), ".gitattributes"}
    assert {e.path for e in api.list_repo_tree(MODEL, "logs")} == {"logs/empty.bin"}
    assert {e.path for e in api.get_paths_info(MODEL, ["logs", "README.md", "none"])} == {"logs", "README.md"}

    hub.requests.clear()
    assert api.upload_folder(repo_id=MODEL, folder_path=folder).oid == done.oid, "nothing has changed"
    assert not [path for _, path, _ in hub.requests if "/commit/" in path or path.startswith("/lfs/")]


def test_commits_branches_and_tags(api: HfApi) -> None:
    api.create_repo(MODEL)
    first = api.create_commit(MODEL, [add("a.txt", b"a"), add("w.bin", WEIGHTS), add("old/b.txt", b"b")], commit_message="First")
    operations = [CommitOperationDelete("old/"), CommitOperationDelete("a.txt"), CommitOperationCopy("w.bin", "copy.bin")]
    second = api.create_commit(MODEL, operations, commit_message="Second", commit_description="Why", parent_commit=first.oid[:7])
    assert set(api.list_repo_files(MODEL)) == {".gitattributes", "w.bin", "copy.bin"}
    assert set(api.list_repo_files(MODEL, revision=first.oid)) == {".gitattributes", "a.txt", "w.bin", "old/b.txt"}
    commits = api.list_repo_commits(MODEL)
    assert [(c.title, c.message, c.authors) for c in commits[:2]] == [("Second", "Why", ["me"]), ("First", "", ["me"])]
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        api.create_commit(MODEL, [add("c.txt", b"c")], commit_message="Late", parent_commit=first.oid)
    with pytest.raises(EntryNotFoundError, match="A file with this name doesn't exist"):
        api.delete_file("none.txt", MODEL)

    api.create_branch(MODEL, branch="dev/one", revision=first.oid)
    api.create_tag(MODEL, tag="v1", revision=first.oid)
    api.upload_file(path_or_fileobj=b"c", path_in_repo="c.txt", repo_id=MODEL, revision="dev/one")
    refs = api.list_repo_refs(MODEL)
    assert {b.name: b.target_commit for b in refs.branches} == {
        "main": second.oid,
        "dev/one": api.model_info(MODEL, revision="dev/one").sha,
    }
    assert {t.name: t.target_commit for t in refs.tags} == {"v1": first.oid}
    assert api.file_exists(MODEL, "c.txt", revision="dev/one")
    assert not api.file_exists(MODEL, "c.txt", revision="v1")
    api.delete_branch(MODEL, branch="dev/one")
    api.delete_tag(MODEL, tag="v1")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(MODEL, revision="v1")


def test_a_pull_request_is_opened_read_and_merged(api: HfApi, hub: Hub, tmp_path: Path) -> None:
    api.create_repo(MODEL)
    head = api.upload_file(path_or_fileobj=b"old", path_in_repo="a.txt", repo_id=MODEL).oid
    guest = HfApi(endpoint=hub.endpoint, token=OTHER_TOKEN)
    with pytest.raises(HfHubHTTPError, match="pass `create_pr=1`"):
        guest.upload_file(path_or_fileobj=b"new", path_in_repo="a.txt", repo_id=MODEL)
    operations = [add("a.txt", b"new"), add("w.bin", WEIGHTS)]
    opened = guest.create_commit(MODEL, operations, commit_message="Repair", commit_description="Why", create_pr=True)
    assert opened.pr_url == f"{hub.endpoint}/{MODEL}/discussions/1"
    assert (opened.pr_num, opened.pr_revision) == (1, "refs/pr/1")
    guest.upload_file(path_or_fileobj=b"more", path_in_repo="b.txt", repo_id=MODEL, revision="refs/pr/1")
    api.upload_file(path_or_fileobj=b"elsewhere", path_in_repo="c.txt", repo_id=MODEL)

    read = api.hf_hub_download(MODEL, "a.txt", revision="refs/pr/1", cache_dir=tmp_path)
    assert Path(read).read_bytes() == b"new"
    assert Path(api.hf_hub_download(MODEL, "a.txt", cache_dir=tmp_path)).read_bytes() == b"old"
    assert [(d.num, d.title, d.author, d.is_pull_request) for d in api.get_repo_discussions(MODEL)] == [(1, "Repair", "another", True)]
    assert [r.ref for r in api.list_repo_refs(MODEL, include_pull_requests=True).pull_requests] == ["refs/pr/1"]
    details = api.get_discussion_details(MODEL, 1)
    assert (details.status, details.target_branch, details.conflicting_files) == ("open", "refs/heads/main", [])
    assert [e.type for e in details.events] == ["comment", "commit", "commit"]

    with pytest.raises(HfHubHTTPError, match="403"):
        guest.merge_pull_request(MODEL, 1)
    api.comment_discussion(MODEL, 1, "Thanks")
    api.merge_pull_request(MODEL, 1)
    merged = api.get_discussion_details(MODEL, 1)
    assert (merged.status, merged.merge_commit_oid) == ("merged", api.model_info(MODEL).sha)
    files = hub.repositories["models", MODEL].files("main")
    assert {p: f.content for p, f in files.items() if p.endswith(".txt")} == {"a.txt": b"new", "b.txt": b"more", "c.txt": b"elsewhere"}
    assert head in [c.commit_id for c in api.list_repo_commits(MODEL)]
    with pytest.raises(HfHubHTTPError, match="it is merged"):
        api.merge_pull_request(MODEL, 1)


def test_pull_requests_that_cannot_be_merged(api: HfApi) -> None:
    api.create_repo(MODEL)
    draft = api.create_pull_request(MODEL, title="A draft")
    assert (draft.status, draft.git_reference) == ("draft", "refs/pr/1")
    api.upload_file(path_or_fileobj=b"mine", path_in_repo="a.txt", repo_id=MODEL, revision="refs/pr/1")
    api.upload_file(path_or_fileobj=b"yours", path_in_repo="a.txt", repo_id=MODEL)
    assert api.get_discussion_details(MODEL, 1).conflicting_files == ["a.txt"]
    with pytest.raises(HfHubHTTPError, match=r"conflicts with the main branch: a\.txt"):
        api.merge_pull_request(MODEL, 1)
    assert api.change_discussion_status(MODEL, 1, "closed").new_status == "closed"
    with pytest.raises(HfHubHTTPError, match="it is closed"):
        api.merge_pull_request(MODEL, 1)
    talk = api.create_discussion(MODEL, title="A question")
    assert (talk.num, talk.is_pull_request) == (2, False)
    assert [d.num for d in api.get_repo_discussions(MODEL, discussion_type="pull_request")] == [1]


def test_an_unchanged_push_opens_no_pull_request(api: HfApi) -> None:
    api.create_repo(MODEL)
    api.upload_file(path_or_fileobj=b"a", path_in_repo="a.txt", repo_id=MODEL)
    assert api.upload_file(path_or_fileobj=b"a", path_in_repo="a.txt", repo_id=MODEL, create_pr=True).pr_url is None
    assert not list(api.get_repo_discussions(MODEL))


def test_cards_are_checked_before_a_commit(api: HfApi, hub: Hub) -> None:
    api.create_repo(MODEL)
    ModelCard(CARD).validate()
    bad = CARD.replace("license: mit", "license: mine")
    with pytest.raises(ValueError, match="license"):
        ModelCard(bad).validate()
    with pytest.raises(ValueError, match=r"Invalid metadata in README\.md"):
        api.upload_file(path_or_fileobj=bad.encode(), path_in_repo="README.md", repo_id=MODEL)
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api.upload_file(path_or_fileobj=b"# No metadata", path_in_repo="README.md", repo_id=MODEL)
    api.upload_file(path_or_fileobj=CARD.encode(), path_in_repo="README.md", repo_id=MODEL)
    assert hub.repositories["models", MODEL].files("main")["README.md"].content.decode() == CARD


def test_collections(api: HfApi, hub: Hub) -> None:
    api.create_repo(MODEL)
    api.create_repo("me/demo", repo_type="space", space_sdk="static")
    made = api.create_collection("Repaired models", description="What was repaired")
    assert made.slug.startswith("me/repaired-models-")
    api.add_collection_item(made.slug, MODEL, "model", note="By nft")
    api.add_collection_item(made.slug, "me/demo", "space")
    with pytest.raises(HfHubHTTPError, match="already in collection"):
        api.add_collection_item(made.slug, MODEL, "model")
    api.add_collection_item(made.slug, MODEL, "model", exists_ok=True)
    with pytest.raises(HfHubHTTPError, match="404"):
        api.add_collection_item(made.slug, "me/none", "model")
    assert api.create_collection("Repaired models", exists_ok=True).slug == made.slug
    read = HfApi(endpoint=hub.endpoint, token=False).get_collection(made.slug)
    assert [(i.item_id, i.item_type, i.note) for i in read.items] == [(MODEL, "model", "By nft"), ("me/demo", "space", None)]
    assert (read.title, read.description) == ("Repaired models", "What was repaired")
    api.delete_collection(made.slug)
    with pytest.raises(HfHubHTTPError, match="404"):
        api.get_collection(made.slug)


@pytest.mark.parametrize(
    ("token", "status", "error"),
    [(False, 401, RepositoryNotFoundError), (OTHER_TOKEN, 404, RepositoryNotFoundError), ("hf_unknown", 401, HfHubHTTPError)],
)
@pytest.mark.parametrize("name", [MODEL, "me/none"])
def test_a_private_repository_is_there_for_its_owner_alone(
    name: str, token: str | bool, status: int, error: type[HfHubHTTPError], api: HfApi
) -> None:
    api.create_repo(MODEL, private=True)
    assert api.model_info(MODEL, token=READ_TOKEN).private
    for call in (api.model_info, api.list_repo_refs, api.list_repo_files):
        with pytest.raises(error) as raised:
            call(name, token=token)
        assert raised.value.response.status_code == status
        assert type(raised.value) is error, "what is private is not told from what is not there"


def test_files_of_a_gated_repository(api: HfApi, hub: Hub, tmp_path: Path) -> None:
    api.create_repo(MODEL)
    api.update_repo_settings(MODEL, gated="manual")
    assert api.model_info(MODEL, token=False).gated == "manual"
    for token, status in ((False, 401), (OTHER_TOKEN, 403)):
        with pytest.raises(GatedRepoError) as raised:
            api.hf_hub_download(MODEL, ".gitattributes", token=token, cache_dir=tmp_path)
        assert raised.value.response.status_code == status
        with pytest.raises(GatedRepoError):
            api.auth_check(MODEL, token=token)
    hub.repositories["models", MODEL].granted.add("another")
    assert Path(api.hf_hub_download(MODEL, ".gitattributes", token=OTHER_TOKEN, cache_dir=tmp_path)).is_file()


METRIC = '''"""Half of what is predicted."""
import datasets
import evaluate


class Half(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("float")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions):
        return {"half": sum(predictions) / 2}
'''
SCRIPT = """
import os
from huggingface_hub import HfApi, ModelCard
api = HfApi()
api.create_repo("me/model")
ModelCard("---\\nlicense: mit\\n---\\n").push_to_hub("me/model")
assert ModelCard.load("me/model").data.license == "mit"
api.create_repo("me/half", repo_type="space", space_sdk="static")
api.upload_file(path_or_fileobj=os.environ["METRIC"].encode(), path_in_repo="half.py", repo_id="me/half", repo_type="space")
assert api.space_info("me/half").sdk == "static"
import evaluate
print(evaluate.load("me/half").compute(predictions=[1.0, 2.0]))
"""


@pytest.mark.slow
def test_a_metric_is_loaded_from_a_space(hub: Hub, tmp_path: Path) -> None:
    """In a process of its own, in which the client finds the Hub by the environment alone."""
    own = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path), "HF_TOKEN": TOKEN, "METRIC": METRIC, "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_OFFLINE")} | own
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "{'half': 1.5}"
    assert ("GET", "/spaces/me/half/resolve/main/half.py", f"Bearer {TOKEN}") in hub.requests
