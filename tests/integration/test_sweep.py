"""Sweeps over lists of models, through the command line: failures, resuming, array jobs, and the table."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
from commands import run

from hf_purify_adapters.vision.demo import TRIGGER

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def preset(stored: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all jobs share."""
    file = tmp_path_factory.mktemp("sweep") / "preset.yaml"
    parts = {"clean": stored / "parquet" / "train.parquet", "test": stored / "parquet" / "test.parquet"}
    lines = [f"{k}: {v}" for k, v in parts.items()]
    file.write_text(
        "\n".join([*lines, f"triggers: ['{TRIGGER}']", "samples: 20", "test_samples: 60", "controls: false", "device: cpu"]), "utf-8"
    )
    return file


def listed(tmp_path: Path, *lines: object) -> Path:
    file = tmp_path / "models.txt"
    file.write_text("\n".join(map(str, lines)), "utf-8")
    return file


def test_failures_do_not_stop_a_sweep_and_what_is_done_is_not_run_again(victim: Path, preset: Path, tmp_path: Path) -> None:
    evil = "/nowhere/<script>alert(1)</script>"
    models = listed(
        tmp_path,
        "# two that are there",
        f"{victim} method=random_mask",
        f"'{evil}'",
        "",
        f"{victim} method=norm_refresh checkpoint_every=5 # again",
    )
    out = tmp_path / "swept"
    first = run("sweep", models, "method=random_mask", "--recipe", preset, "-o", out, "--workers", 2)
    assert first.exit_code == 6, first.output
    assert "2 done, 1 failed, 0 not run" in first.stdout
    assert f"failed: {evil}: no folder" in first.stderr
    rows = datasets.Dataset.from_parquet(str(out / "sweep.parquet"), cache_dir=str(tmp_path / "cache")).to_list()
    assert [(r["status"], r["method"]) for r in rows] == [("done", "random_mask"), ("failed", None), ("done", "norm_refresh")]
    assert rows[0]["asr_before"] >= 0.9
    assert rows[0]["asr_n"] == 54
    assert rows[1]["exit_code"] == 2
    page = (out / "sweep.html").read_text("utf-8")
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert f'href="{rows[0]["folder"]}/report.html"' in page
    reports = {r["folder"]: (out / r["folder"] / "report.json").stat().st_mtime_ns for r in rows if r["status"] == "done"}
    models.write_text(models.read_text("utf-8").replace(f"'{evil}'", ""), "utf-8")
    second = run("sweep", models, "method=random_mask", "--recipe", preset, "-o", out)
    assert second.exit_code == 0, second.output
    assert "2 done, 0 failed, 0 not run; written to" in second.stdout
    assert {name: (out / name / "report.json").stat().st_mtime_ns for name in reports} == reports


def test_array_jobs_run_one_line_each_and_are_collected(victim: Path, preset: Path, tmp_path: Path) -> None:
    models, out = listed(tmp_path, f"{victim} seed=1", f"{victim} seed=2"), tmp_path / "swept"
    given = [models, "method=random_mask", "--recipe", preset, "-o", out]
    assert run("sweep", *given, "--only", 2).exit_code == 0
    assert not (out / "sweep.html").exists()
    collected = run("sweep", *given, "--collect")
    assert collected.exit_code == 0
    assert "1 done, 0 failed, 1 not run" in collected.stdout
    beyond = run("sweep", *given, "--only", 3)
    assert beyond.exit_code == 2
    assert "there are 2 jobs in" in beyond.stderr


def test_stopped_sweep_stops_its_jobs(victim: Path, preset: Path, tmp_path: Path) -> None:
    models, out = listed(tmp_path, victim), tmp_path / "swept"
    command = ["sweep", models, "method=nft", "options.steps=100000", "--recipe", preset, "-o", out]
    sweep = subprocess.Popen([sys.executable, "-m", "hf_purify", *map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 90
        while not list(out.glob(".*-*")) and sweep.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert list(out.glob(".*-*")), "the job has begun"
        sweep.send_signal(signal.SIGTERM)
        assert sweep.wait(60) == 143
    finally:
        sweep.kill()
    assert sorted(f.name for f in out.iterdir()) == ["jobs", "sweep.html", "sweep.parquet"], "the job put its folder away"
    assert "not run" in (out / "sweep.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("lines", "given", "said"),
    [
        ([], [], "names no model; expected one a line"),
        (["some/model methd=nft"], [], "line 1 of '{models}': unknown setting 'methd'; did you mean 'method'?"),
        (["# ok", "some/model method=nftt"], [], "line 2 of '{models}': unknown method 'nftt'; did you mean 'nft'?"),
        (["some/model options.step=3 method=nft"], [], "did you mean 'steps'"),
        (["some/model 'quoted"], [], "line 1 of '{models}': No closing quotation"),
        (["some/model"], ["samples"], "expected key=value"),
        (["some/model"], ["--job", "scan"], "unknown job 'scan'"),
        (["some/model"], ["--recipe", "nowhere"], "unknown recipe 'nowhere'"),
    ],
)
def test_what_is_no_sweep_is_said_before_anything_runs(tmp_path: Path, lines: list[str], given: list[str], said: str) -> None:
    models = listed(tmp_path, *lines)
    done = run("sweep", models, "clean=data", *given, "-o", tmp_path / "swept")
    assert done.exit_code == 2, done.output
    assert said.format(models=models) in done.stderr
    assert not (tmp_path / "swept").exists()


def test_list_that_is_not_there(tmp_path: Path) -> None:
    done = run("sweep", tmp_path / "nowhere.txt", "clean=data", "-o", tmp_path / "swept")
    assert done.exit_code == 2
    assert "cannot read the list of models" in done.stderr
