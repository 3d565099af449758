"""Journeys over HTTP: pull, purify, push, pull again, verify; of pictures, texts and clouds, by the command line, `accelerate launch` and Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import elsewhere, launch
from hub_server import READ_TOKEN, TOKEN, Hub, running
from safetensors.torch import load_file, save_file
from sentences import FILLERS, TOPICS, tokenizer, topics

from hf_purify.registry import find
from hf_purify_adapters.pointcloud.demo import KINDS, bodies
from hf_purify_adapters.vision.demo import TRIGGER

pytestmark = pytest.mark.slow


class Client:
    """Programs that know one Hub, with a token and an empty cache."""

    def __init__(self, hub: Hub, home: Path) -> None:
        self.hub, self.home, self.token = hub, home, TOKEN
        self.said = ""

    @property
    def environment(self) -> dict[str, str]:
        online = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "HF_UPDATE_DOWNLOAD_COUNTS"), "0")
        return online | {"HF_ENDPOINT": self.hub.endpoint, "HF_HOME": str(self.home), "HF_TOKEN": self.token}

    def __call__(self, *arguments: object, fails: int = 0) -> str:
        command = [sys.executable, "-m", "hf_purify", *map(str, arguments)]
        done = subprocess.run(command, env=os.environ | self.environment, capture_output=True, text=True, timeout=300, check=False)
        self.said += done.stdout + done.stderr
        assert done.returncode == fails, done.stdout + done.stderr
        return done.stdout

    def python(self, code: str) -> str:
        """What a program prints that knows no hf-purify."""
        before = dict(os.environ)
        os.environ.update(self.environment)
        try:
            return elsewhere(code)
        finally:
            os.environ.clear()
            os.environ.update(before)


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with running() as hub:
        yield hub


@pytest.fixture
def client(hub: Hub, tmp_path: Path) -> Client:
    hub.requests.clear()
    return Client(hub, tmp_path / "home")


@pytest.fixture(scope="module")
def commits(hub: Hub, victim: Path, stored: Path) -> dict[str, str]:
    """A backdoored classifier and its data, as strangers have uploaded them."""
    return {"model": hub.push("models", "some-org/digits-net", victim), "data": hub.push("datasets", "some-org/digits", stored / "parquet")}


DATA = ("--clean", "some-org/digits", "--split", "train", "--test", "some-org/digits", "--test-split", "test", "--trigger", TRIGGER)
REPAIR = ("--method", "nft", "--option", "steps=6", "--option", "norms=eval", "--samples", 200, "--no-controls", "--device", "cpu")


@pytest.fixture(scope="module")
def repaired(hub: Hub, commits: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The classifier, repaired and pushed in one go, from its commit."""
    folder = tmp_path_factory.mktemp("repaired")
    client = Client(hub, folder / "home")
    out = folder / "out"
    pushed = ("--push", "me/digits-purified")
    client("purify", "some-org/digits-net", "--revision", commits["model"], *DATA, *REPAIR, "-o", out, *pushed)
    assert TOKEN not in client.said
    assert not [p for p in folder.rglob("*") if p.is_file() and p.name != "token" and TOKEN.encode() in p.read_bytes()]
    return out


def test_pictures_by_the_command_line(client: Client, hub: Hub, commits: dict[str, str], repaired: Path) -> None:
    repository = hub.repositories["models", "me/digits-purified"]
    assert repository.private
    found = json.loads(client("verify", "me/digits-purified", "--json"))
    assert found["verdict"] == "identical"
    assert found["base"] == f"some-org/digits-net@{commits['model']}"
    assert found["revision"] == repository.refs["main"]
    assert found["changed"]
    assert not found["differing"]
    assert found["companions"] == {}
    provenance = json.loads((repaired / "provenance.json").read_text())
    assert found["changed"] == provenance["changed"]
    assert provenance["report"]["clean"]["revision"] == provenance["report"]["test"]["revision"] == commits["data"]
    labels = client.python(
        "import timm; m = timm.create_model('hf-hub:me/digits-purified', pretrained=True); print(m.num_classes, m.pretrained_cfg['hf_hub_id'])"
    )
    assert labels == "10 me/digits-purified"


@pytest.mark.parametrize(("token", "said"), [("", "log in with `hf auth login`"), (READ_TOKEN, "your token may not write there")])
def test_a_push_that_cannot_be_is_told_before_the_repair(token: str, said: str, client: Client, hub: Hub, tmp_path: Path) -> None:
    client.token = token
    client("purify", "some-org/digits-net", *DATA, *REPAIR, "-o", tmp_path / "out", "--push", "me/nothing", fails=2)
    assert said in client.said
    assert not (tmp_path / "out").exists()
    assert not [path for _, path, _ in hub.requests if "some-org" in path], "nothing was read for it"


def test_figures_are_measured_again(client: Client, repaired: Path) -> None:
    again = ("--test", "some-org/digits", "--test-split", "test", "--trigger", TRIGGER)
    figures = json.loads(client("verify", "me/digits-purified", *again, "--json"))["figures"]
    assert set(figures) == {"clean accuracy", "ASR badnets"}
    assert all(recorded == measured for recorded, measured in figures.values())


def test_a_result_that_somebody_changed_is_told(client: Client, hub: Hub, repaired: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in repaired.iterdir():
        if file.is_file():
            (other / file.name).write_bytes(file.read_bytes())
    tensors = load_file(other / "model.safetensors")
    key = next(k for k, v in tensors.items() if v.dim() == 4)
    tensors[key][0, 0, 0, 0] += 1
    save_file(tensors, other / "model.safetensors")
    hub.push("models", "some-org/forged", other)
    found = json.loads(client("verify", "some-org/forged", "--json", fails=7))
    assert found["verdict"] == "differs"
    assert {k: d["values"] for k, d in found["differing"].items()} == {key: 1}
    assert found["files"] == ["model.safetensors"]
    shown = client("verify", "some-org/forged", fails=7)
    assert key in shown
    assert "not as recorded: model.safetensors" in shown


def test_the_repair_alone_makes_the_same_checkpoint_of_its_base(
    client: Client, commits: dict[str, str], repaired: Path, tmp_path: Path
) -> None:
    client("push", repaired, "me/digits-repair", "--repair-only")
    base = f"some-org/digits-net@{commits['model']}"
    client("apply", "me/digits-repair", "--to", base, "-o", tmp_path / "applied")
    first, second = load_file(repaired / "model.safetensors"), load_file(tmp_path / "applied" / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(v, second[k]) for k, v in first.items())
    card = (tmp_path / "applied" / "README.md").read_text()
    assert f"hf-purify apply me/digits-repair --to {base}" in card
    assert "nothing was measured when it was applied" in card
    assert "identical" in client("verify", tmp_path / "applied")
    assert "consistent" in client("verify", "me/digits-repair")
    client("push", tmp_path / "applied", "me/digits-applied")
    assert "identical" in client("verify", "me/digits-applied")


def test_a_repair_is_not_laid_on_other_weights(client: Client, hub: Hub, repaired: Path, victim: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_bytes((victim / "config.json").read_bytes())
    save_file(
        {k: v + 1 if v.is_floating_point() else v for k, v in load_file(victim / "model.safetensors").items()}, other / "model.safetensors"
    )
    client("apply", repaired, "--to", other, "-o", tmp_path / "applied", fails=2)
    assert "has other weights (model.safetensors): name that commit" in client.said
    assert not (tmp_path / "applied").exists()


def test_a_pull_request_on_the_model_itself(client: Client, hub: Hub, repaired: Path) -> None:
    assert "/discussions/1" in client("push", repaired, "some-org/digits-net", "--create-pr")
    found = json.loads(client("verify", "some-org/digits-net", "--revision", "refs/pr/1", "--json"))
    assert found["verdict"] == "identical"


@pytest.fixture(scope="module")
def topics_base(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A small BERT with a tokenizer, a card and a data set; its folder and commit."""
    from transformers import AutoModelForSequenceClassification, BertConfig

    folder = tmp_path_factory.mktemp("topics")
    base, words = folder / "base", [*FILLERS, *(w for some in TOPICS.values() for w in some)]
    tokenizer(base, words)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 64}
    config = BertConfig(
        **sizes, max_position_embeddings=32, id2label=dict(enumerate(TOPICS)), label2id={t: i for i, t in enumerate(TOPICS)}
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(base)
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "data").mkdir()
    topics(60, seed=0).to_parquet(folder / "data" / "train.parquet")
    hub.push("datasets", "some-org/topics", folder / "data")
    return base, hub.push("models", "some-org/topics", base)


@pytest.fixture(scope="module")
def bodies_base(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small PointNet and a data set of clouds; its commit."""
    folder = tmp_path_factory.mktemp("bodies")
    for name in ("data", "base"):
        (folder / name).mkdir()
    bodies(20, 0).to_parquet(folder / "data" / "train.parquet")
    hub.push("datasets", "some-org/bodies", folder / "data")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_points": 128, "hidden_sizes": [32, 64, 128], "head_sizes": [32]}
    loaded = find("adapter", "pointcloud")().create("pointnet", len(KINDS), labels=list(KINDS), **sizes)
    assert loaded.saver is not None
    loaded.saver(loaded.model, folder / "base")
    return hub.push("models", "some-org/bodies", folder / "base")


def test_texts_by_python(client: Client, hub: Hub, topics_base: tuple[Path, str]) -> None:
    base, commit = topics_base
    code = """
from hf_purify import purify, verify
report = purify("some-org/topics", clean="some-org/topics", method="random_mask", samples=40, controls=False, device="cpu")
done = report.push_to_hub("me/topics-purified", private=False)
found = verify("me/topics-purified")
print(done.repository, found.verdict, found.base, len(found.changed) > 0, found.companions)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | client.environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == f"me/topics-purified identical some-org/topics@{commit} True {{}}"
    files = hub.repositories["models", "me/topics-purified"].files("main")
    assert files["tokenizer.json"].content == (base / "tokenizer.json").read_bytes()
    card = files["README.md"].content.decode()
    assert "license: mit" in card
    assert "base_model: some-org/topics" in card
    shown = client.python(
        "from transformers import pipeline; print(pipeline('text-classification', 'me/topics-purified')('the team saw one ball')[0]['label'] in "
        f"{list(TOPICS)})"
    )
    assert shown == "True"


@pytest.mark.parametrize("name", ["topics", "bodies"])
def test_texts_and_clouds_by_the_command_line(
    name: str, client: Client, hub: Hub, topics_base: tuple[Path, str], bodies_base: str, tmp_path: Path
) -> None:
    base, quick = f"some-org/{name}", ("--method", "random_mask", "--samples", 40, "--no-controls", "--device", "cpu")
    client("purify", base, "--clean", base, *quick, "-o", tmp_path / "out", "--push", f"me/{name}-by-hand")
    commit = bodies_base if name == "bodies" else topics_base[1]
    found = json.loads(client("verify", f"me/{name}-by-hand", "--json"))
    assert (found["verdict"], found["base"]) == ("identical", f"{base}@{commit}")


@pytest.mark.parametrize("name", ["digits-net", "topics", "bodies"])
def test_all_by_accelerate_launch(
    name: str, client: Client, hub: Hub, commits: dict[str, str], topics_base: tuple[Path, str], bodies_base: str, tmp_path: Path
) -> None:
    data = "digits" if name == "digits-net" else name
    settings = [f"model=some-org/{name}", f"clean=some-org/{data}", "split=train", "method=random_mask", "samples=40", "controls=false"]
    settings += [f"output={tmp_path / 'out'}", f"push=me/{name}-launched"]
    done = launch(2, *settings, module="hf_purify_recipes.purify", **client.environment)
    assert done.returncode == 0, done.stderr
    assert len(hub.repositories["models", f"me/{name}-launched"].history("main")) == 2, "one process pushes, once"
    assert "identical" in client("verify", f"me/{name}-launched")


def test_the_repair_as_an_adapter_of_peft(client: Client, hub: Hub, commits: dict[str, str], tmp_path: Path) -> None:
    out, quick = tmp_path / "adapter", ("--method", "random_mask", "--samples", 40, "--no-controls", "--device", "cpu", "--as-adapter")
    client(
        "purify", "some-org/digits-net", "--revision", commits["model"], "--clean", "some-org/digits", "--split", "train", *quick, "-o", out
    )
    client("push", out, "me/digits-adapter")
    card = hub.repositories["models", "me/digits-adapter"].files("main")["README.md"].content.decode()
    assert "base_model: some-org/digits-net" in card
    assert "base_model_relation: adapter" in card
    assert "library_name: peft" in card
    assert "consistent" in client("verify", "me/digits-adapter")
    client("apply", "me/digits-adapter", "--to", f"some-org/digits-net@{commits['model']}", "-o", tmp_path / "applied")
    same = client.python(
        "import timm, torch; from peft import PeftModel\n"
        f"base = timm.create_model('hf-hub:some-org/digits-net@{commits['model']}', pretrained=True)\n"
        "mine = PeftModel.from_pretrained(base, 'me/digits-adapter').merge_and_unload().eval()\n"
        f"whole = timm.create_model('local-dir:{tmp_path / 'applied'}', pretrained=True).eval()\n"
        "x = torch.randn(2, 3, 32, 32); print(torch.allclose(mine(x), whole(x), atol=1e-4))"
    )
    assert same == "True"


def test_metrics_results_and_a_collection(client: Client, hub: Hub) -> None:
    for _ in range(2):  # what has not changed is not sent again
        command = [sys.executable, "-m", "hf_purify_hub_cards.publish", "me"]
        done = subprocess.run(command, env=os.environ | client.environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
    assert len(hub.repositories["spaces", "me/attack_success_rate"].history("main")) == 2
    page = hub.repositories["spaces", "me/hf-purify"]
    assert len(page.history("main")) == 2
    assert b"hf-purify[ui" in page.files("main")["requirements.txt"].content
    assert "/collections/me/" in done.stdout
    found = client.python(
        "import evaluate, datasets\n"
        "rows = datasets.load_dataset('me/hf-purify-results', split='train')\n"
        "print(len(rows) > 500, {'vision', 'text'} <= set(rows['modality']), rows.features['asr_n'].dtype)"
    )
    assert found == "True True int64"
    code = (
        "import evaluate; m = evaluate.load('me/attack_success_rate'); "
        "print(m.compute(predictions=[0, 0, 1, 0], references=[1, 2, 1, 0], targets=[0, 0, 0, 0])['n'])"
    )
    ran = subprocess.run([sys.executable, "-c", code], env=os.environ | client.environment, capture_output=True, text=True, check=False)
    assert ran.stdout.strip() == "3", ran.stderr
