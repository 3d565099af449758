"""Jobs that are interrupted and go on: from each of their checkpoints, and after twenty kills."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from shrunk import small
from torch import Tensor
from worlds import context

from hf_purify.cli import app
from hf_purify.errors import ConfigError, OutputError
from hf_purify.loop import TrainConfig, train
from hf_purify.method import Context, Sequential
from hf_purify.recipe import PurifyRecipe
from hf_purify.registry import names
from hf_purify.resuming import Progress

TESTS = Path(__file__).resolve().parents[1]
CASES = [(name, "vision", "resnet") for name in names("method")] + [
    ("rnp+ft_sam", "vision", "resnet"),
    ("nft", "text", "bert"),
    ("neural_cleanse", "text", "bert"),
    ("neural_cleanse", "pointcloud", "pointnet"),
    ("fine_tune", "pointcloud", "pointnet"),
]


class Killed(BaseException):
    """The end of a run, right behind a checkpoint."""


class Dies(Progress):
    """Checkpoints of a run that ends behind the first that it writes."""

    def write(self, state: Any, entry: dict[str, Any]) -> None:
        super().write(state, entry)
        raise Killed


def progress(folder: Path, kind: type[Progress] = Progress, every: int = 2, **changes: Any) -> Progress:
    given: dict[str, Any] = {"job": {"seed": 0}, "versions": {"torch": "1"}, "accelerator": Accelerator(cpu=True)}
    return kind(folder / "out.checkpoint", every, **{**given, **changes})


def repaired(case: tuple[str, str, str], checkpoints: Progress | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a method leaves of a tiny model: weights, mask, scores and notes."""
    name, adapter, variant = case
    ctx: Context = context(adapter, variant, Accelerator(cpu=True))
    ctx.progress = checkpoints
    torch.manual_seed(0)
    methods = [small(part, batch_size=5) for part in name.split("+")]
    methods = [type(m)(m.config, cut=1.0) if m.name == "neural_cleanse" else m for m in methods]  # it takes the cheapest class then
    verdict = (Sequential(methods) if len(methods) > 1 else methods[0])(ctx)
    return ctx.model.state_dict() | {
        "mask": verdict.mask,
        "scores": verdict.scores,
        "next draw": torch.rand(3, generator=ctx.generator),
    }, verdict.notes


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_run_that_dies_behind_each_checkpoint_ends_as_one_that_does_not(tmp_path: Path, case: tuple[str, str, str]) -> None:
    expected, notes = repaired(case, None)
    runs = 0
    while True:
        try:
            found, said = repaired(case, progress(tmp_path, Dies))
            break
        except Killed:
            runs += 1
            assert runs < 200
    assert said == notes
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=0, equal_nan=True, msg=lambda text, key=key: f"{key}: {text}")
    if case[0] not in ("norm_refresh", "random_mask"):
        assert runs >= 2, "it had checkpoints"


def test_twenty_kills(victim: Path, stored: Path, tmp_path: Path) -> None:
    """The same checkpoint, no folder half-written, and no more than the steps since the last checkpoint are taken again."""
    done = subprocess.run(
        [sys.executable, str(TESTS / "kills.py"), str(victim), str(stored / "parquet"), str(tmp_path), "20"],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads((tmp_path / "seen.json").read_text("utf-8"))
    assert seen["kills"] == 20
    assert seen["resumed"] >= 10, "kills in the midst of a training"
    assert seen["lost"] <= seen["every"]
    assert seen["half_written"] == []
    assert {f.name for f in tmp_path.iterdir()} == {"once", "killed", "seen.json"}
    for name in ("model.safetensors", "neuron_mask.safetensors"):
        once, killed = load_file(tmp_path / "once" / name), load_file(tmp_path / "killed" / name)
        assert once.keys() == killed.keys()
        assert all(torch.equal(once[k], killed[k]) for k in once)


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """A checkpoint of a job that was killed."""
    with pytest.raises(Killed):
        repaired(("fine_tune", "vision", "resnet"), progress(tmp_path, Dies))
    return tmp_path / "out.checkpoint"


def _changed(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        found = json.loads((folder / "manifest.json").read_text("utf-8"))
        change(found)
        (folder / "manifest.json").write_text(json.dumps(found), "utf-8")

    return apply


def _cut(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])


def _pickled(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    torch.save({"optimizer": {}}, folder / "optimizer.bin")


BROKEN: list[tuple[Callable[[Path], object], str]] = [
    (_cut, "is damaged: '0-2.safetensors' is not what its manifest says. Delete it"),
    (lambda f: next(f.glob("*.safetensors")).unlink(), "is damaged"),
    (lambda f: (f / "manifest.json").unlink(), "is no checkpoint of hf-purify"),
    (lambda f: (f / "manifest.json").write_text("{", "utf-8"), "is no checkpoint of hf-purify"),
    (lambda f: (f / "manifest.json").write_text("[]", "utf-8"), "is no checkpoint of hf-purify"),
    (_pickled, "only what hf-purify wrote is resumed"),
    (_changed(lambda m: m.update(format="other/1")), "expected format 'hf-purify-checkpoint/1', got 'other/1'"),
    (_changed(lambda m: m.update(stages=[{}])), "is no checkpoint of hf-purify"),
    (_changed(lambda m: m["stages"][0].update(file="../x")), "its manifest names files elsewhere"),
    (_changed(lambda m: m["versions"].update(torch="0.9")), "with other versions (torch: '0.9' there, '1' here): make them alike"),
    (_changed(lambda m: m["job"].update(seed=3)), "by another job (seed: 3 there, 0 here)"),
    (_changed(lambda m: m.update(processes=2)), "was written by 2 processes, and now there are 1: launch as many"),
    (
        _changed(lambda m: m["stages"][0].update(title="NFT")),
        "another course of this job: its training 1 was 'NFT', and now it is 'fine-tune'",
    ),
]


@pytest.mark.parametrize(("spoil", "said"), BROKEN, ids=[said[:30] for _, said in BROKEN])
def test_what_is_not_resumed(left: Path, tmp_path: Path, spoil: Callable[[Path], object], said: str) -> None:
    spoil(left)
    before = {f.name: f.read_bytes() for f in left.iterdir()}
    with pytest.raises(OutputError) as error:
        repaired(("fine_tune", "vision", "resnet"), progress(tmp_path))
    assert said in str(error.value)
    assert {f.name: f.read_bytes() for f in left.iterdir()} == before, "nothing is lost"


def test_what_a_kill_left_beside_a_checkpoint_is_removed(left: Path, tmp_path: Path) -> None:
    (left / "0-4.safetensors").write_bytes(b"half")
    (left / ".manifest.json.1.tmp").write_bytes(b"half")
    progress(tmp_path)
    assert sorted(f.name for f in left.iterdir()) == ["0-2.safetensors", "manifest.json"]


def test_kill_before_the_first_manifest(tmp_path: Path) -> None:
    folder = tmp_path / "out.checkpoint"
    folder.mkdir()
    (folder / ".manifest.json.1.tmp").write_bytes(b"half")
    progress(tmp_path)
    assert [f.name for f in folder.iterdir()] == ["manifest.json"]


def test_disk_that_fills_keeps_the_last_checkpoint(left: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {f.name: f.read_bytes() for f in left.iterdir()}

    def full(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("hf_purify.resuming.save_file", full)
        checkpoints = progress(tmp_path)
        with pytest.raises(OutputError, match=r"No space left on device; what was written before is kept"):
            repaired(("fine_tune", "vision", "resnet"), checkpoints)
    expected, _ = repaired(("fine_tune", "vision", "resnet"), None)
    assert before.items() <= {f.name: f.read_bytes() for f in left.iterdir()}.items()
    found, _ = repaired(("fine_tune", "vision", "resnet"), progress(tmp_path))
    assert all(torch.equal(found[k], v) for k, v in expected.items())


@pytest.mark.parametrize(("limit", "checkpoints"), [(100_000, True), (100_000, False), (2000, True)])
def test_command_on_a_full_disk(victim: Path, stored: Path, tmp_path: Path, limit: int, checkpoints: bool) -> None:
    """The system refuses to let files grow; the message says so, and nothing is half-written."""
    more = ["-m", "fine_tune", *(["--checkpoint-every", "3"] if checkpoints else [])]
    script = (
        "import resource, sys\nimport hf_purify.purifier\nfrom hf_purify.cli import app\nfrom hf_purify.tables import open_data\n"
        "open_data(sys.argv[4])  # into the cache of datasets\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\napp(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", script, *purify_cli(victim, stored, tmp_path / "out", *more)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert "File too large" in done.stderr
    assert "cannot write" in done.stderr
    assert "Traceback" not in done.stderr
    left = sorted(f.relative_to(tmp_path).as_posix() for f in tmp_path.rglob("*"))
    assert left == (["out.checkpoint", "out.checkpoint/manifest.json"] if checkpoints else [])


def purify_cli(victim: Path, stored: Path, out: Path, *more: str) -> list[str]:
    data = stored / "parquet"
    return [
        "purify",
        str(victim),
        "--clean",
        str(data / "train.parquet"),
        "-o",
        str(out),
        "--device",
        "cpu",
        "-n",
        "60",
        "--no-controls",
        *more,
    ]


def invoke(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as end:
        app(arguments)
    return int(end.value.code or 0)


@pytest.fixture
def interrupted(victim: Path, stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """The checkpoint of a command that was interrupted."""
    write = Progress.write

    def once(self: Progress, state: Any, entry: dict[str, Any]) -> None:
        write(self, state, entry)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "write", once)
        code = invoke(purify_cli(victim, stored, tmp_path / "out", "-m", "fine_tune", "--checkpoint-every", "3"))
    assert code == 130
    assert f"the same command goes on from the checkpoint '{tmp_path / 'out.checkpoint'}'" in capsys.readouterr().err
    return tmp_path / "out.checkpoint"


def test_command_goes_on(victim: Path, stored: Path, tmp_path: Path, interrupted: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert invoke(purify_cli(victim, stored, tmp_path / "other", "-m", "fine_tune")) == 0
    assert invoke(purify_cli(victim, stored, tmp_path / "out", "-m", "fine_tune", "--checkpoint-every", "3")) == 0
    assert "resuming 'fine-tune' at step 3 (training 1 of the job)" in caplog.text
    assert not interrupted.exists()
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "other"))
    assert all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["-m", "fine_tune", "--seed", "1"], "was written by another job (samples: "),
        (["-m", "fine_tune", "--option", "lr=0.5"], "options: None there, {'lr': 0.5} here"),
        (["-m", "nft"], "was written by another job (method: 'fine_tune' there, None here)"),
    ],
)
def test_another_job_is_refused(
    victim: Path, stored: Path, tmp_path: Path, interrupted: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    assert invoke(purify_cli(victim, stored, tmp_path / "out", "--checkpoint-every", "3", *more)) == 2
    assert said in capsys.readouterr().err
    assert (interrupted / "manifest.json").is_file()


def test_checkpoint_of_other_weights_is_refused(
    victim: Path, stored: Path, tmp_path: Path, interrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(victim / "model.safetensors")
    metadata = {"format": "pt"}
    other = tmp_path / "other"
    subprocess.run(["cp", "-r", str(victim), str(other)], check=True)
    save_file({k: v + 1e-3 if v.is_floating_point() else v for k, v in weights.items()}, other / "model.safetensors", metadata)
    assert invoke(purify_cli(other, stored, tmp_path / "out", "-m", "fine_tune", "--checkpoint-every", "3")) == 2
    assert "model's weights: " in capsys.readouterr().err


def test_without_the_setting_the_checkpoint_is_named(
    victim: Path, stored: Path, tmp_path: Path, interrupted: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert invoke(purify_cli(victim, stored, tmp_path / "out", "-m", "norm_refresh")) == 0
    assert f"a checkpoint of an interrupted job lies in '{interrupted}'" in caplog.text
    assert interrupted.exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["--checkpoint-every", "0"], "checkpoint_every must be at least 1, got 0"),
        (["--accumulate", "0"], "accumulate must be at least 1, got 0"),
    ],
)
def test_bad_settings(
    victim: Path, stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: list[str], said: str
) -> None:
    assert invoke(purify_cli(victim, stored, tmp_path / "out", *settings)) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_need_an_output() -> None:
    with pytest.raises(ConfigError, match=r"checkpoints lie beside the output: give output=\.\.\."):
        PurifyRecipe.make(model="x", clean="y", checkpoint_every=3)


def test_steps_between_checkpoints_cost_nothing(tmp_path: Path) -> None:
    """A state is gathered where one is written, and nowhere else."""
    ctx = context("vision", "resnet", Accelerator(cpu=True))
    written: list[int] = []

    class Counts(Progress):
        def write(self, state: Any, entry: dict[str, Any]) -> None:
            written.append(entry["step"])
            super().write(state, entry)

    ctx.progress = progress(tmp_path, Counts, every=4)
    train(ctx, ctx.parameters(), TrainConfig(steps=10, batch_size=4))
    assert written == [4, 8, None]
