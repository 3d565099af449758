"""The benchmark script: methods, sizes and seeds of one victim, in cells that are not run again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_purify_recipes.benchmark import main

pytestmark = pytest.mark.slow


def settings(victim: Path, stored: Path, out: Path) -> list[str]:
    parts = {"model": victim, "clean": stored / "parquet" / "train.parquet", "test": stored / "parquet" / "test.parquet", "output": out}
    return [*(f"{k}={v}" for k, v in parts.items()), "triggers=['badnets:size=4,position=bottom-right']"]


def test_cells_are_run_once_and_joined(victim: Path, stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "benchmark"
    given = [*settings(victim, stored, out), "methods=[random_mask,norm_refresh]", "seeds=[0,1]", "sizes=[20]", "test_samples=60"]
    main(given)
    names = {f"{m}-n20-s{s}.json" for m in ("none", "random_mask", "norm_refresh") for s in (0, 1)}
    written = {f.name: f.stat().st_mtime_ns for f in (out / "cells").iterdir()}
    assert set(written) == names
    page = (out / "RESULTS.md").read_text("utf-8")
    assert "| random_mask (control) | 2 |" in page
    (out / "cells" / "random_mask-n20-s1.json").unlink()
    main(given)
    again = {f.name: f.stat().st_mtime_ns for f in (out / "cells").iterdir()}
    assert {n for n in names if again[n] != written[n]} == {"random_mask-n20-s1.json", "none-n20-s1.json"}
    assert len(json.loads((out / "results.json").read_text("utf-8"))) == 6
    with pytest.raises(SystemExit) as end:
        main([*given, "target=1"])
    assert end.value.code == 2
    assert "are of other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["methods=[rpn]"], "did you mean 'rnp'"),
        (["methods=rnp"], "methods must be a list of names, such as methods=[rnp]"),
        (["seeds=[a]"], "seeds must be a list of whole numbers"),
        (["sizes=[0]"], "samples must be at least 1, got 0"),
        (["triggers=[]"], "a benchmark needs output=FOLDER"),
        (["sample=3"], "did you mean 'samples'"),
        (["checkpoint_every=3"], "a benchmark keeps each cell that is done: leave checkpoint_every out"),
    ],
)
def test_bad_settings(victim: Path, stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str) -> None:
    with pytest.raises(SystemExit) as end:
        main([*settings(victim, stored, tmp_path / "out"), *more])
    assert end.value.code == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
