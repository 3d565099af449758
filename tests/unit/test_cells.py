"""Cells of a results matrix: run once, kept, joined; a repair that diverges stops no other."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hf_purify.errors import Diverged
from hf_purify.metrics import Proportion
from hf_purify.rows import Row
from hf_purify_recipes import cells, pages

COMMON = {"network": "net", "trigger": "badnets", "seed": 0, "samples": 9}


def row(name: str, hits: int) -> Row:
    return Row(name, "method", Proportion(9, 10), {"badnets": Proportion(hits, 10)}, der={"badnets": 0.5}, seconds=1.0)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was repaired, in order; one method diverges."""
    done: list[str] = []

    def repair(method: Any) -> Any:
        done.append(method.name)
        if method.name == "ulrl":
            raise Diverged("the loss became nan at step 3")
        return SimpleNamespace(row=row(method.name, 1))

    monkeypatch.setattr(cells, "open_comparison", lambda recipe: SimpleNamespace(unrepaired=row("none", 10), repair=repair))
    return done


def test_cells_are_run_once_and_a_divergence_stops_no_other(ran: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    methods = ["ulrl", "fine_tune", "neural_cleanse-long"]
    cells.run(lambda: None, tmp_path / "a", COMMON, methods, {"neural_cleanse-long": {"steps": 140}})  # type: ignore[arg-type]
    assert ran == ["ulrl", "fine_tune", "neural_cleanse"]
    assert "net with badnets, ulrl: the loss became nan at step 3" in caplog.text
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "fine_tune-n9-s0.json",
        "neural_cleanse-long-n9-s0.json",
        "none-n9-s0.json",
    ]
    cells.run(lambda: None, tmp_path / "a", COMMON, ["fine_tune", "rnp"], {})  # type: ignore[arg-type]
    assert ran[3:] == ["rnp"]


def test_cells_join_what_is_there_and_new_ones_win(ran: list[str], tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    old = {**COMMON, "method": "rnp", "kind": "method", "asr": {"value": 0.9}}
    other = old | {"network": "another"}
    results.write_text(json.dumps([old, other]))
    cells.run(lambda: None, tmp_path / "cells", COMMON, ["rnp"], {})  # type: ignore[arg-type]
    joined = cells.collect(tmp_path / "cells", results)
    assert [(c["network"], c["method"]) for c in joined] == [("another", "rnp"), ("net", "none"), ("net", "rnp")]
    assert joined[2]["asr"]["value"] == 0.1
    assert json.loads(results.read_text()) == joined


def test_unknown_names_are_said_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from hf_purify_recipes.pointcloud.matrix import MATRIX

    for option, name, message in (
        ("--networks", "pointnot", "did you mean 'pointnet'"),
        ("--triggers", "pcb", "did you mean 'pcba'"),
        ("--methods", "ntf", "did you mean 'nft'"),
        ("--methods", "nft-long", "unknown variant 'nft-long'"),
    ):
        monkeypatch.setattr("sys.argv", ["matrix.py", option, name, "--folder", str(tmp_path / "runs")])
        with pytest.raises(SystemExit) as stopped:
            MATRIX.main()
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_trigger_with_more_seeds_counts_no_more() -> None:
    def cell(trigger: str, seed: int, method: str, der: float, correct: float) -> dict[str, Any]:
        figures = {"asr": {"value": 1 - der, "low": 0, "high": 1, "n": 9}, "clean_accuracy": {"value": correct}, "der": der, "seconds": 1.0}
        return {**COMMON, "trigger": trigger, "seed": seed, "method": method, "kind": "method", "notes": {}, **figures}

    found = [cell(t, 0, "none", 0.5, 0.9) for t in ("a", "b")]
    found += [cell("a", seed, "rnp", 0.9, 0.8) for seed in range(3)] + [cell("b", 0, "rnp", 0.5, 0.9)]
    assert "| rnp | 2 | 70.0 ± 28.3 | 50.0 | 30.0 ± 28.3 | 5.0 ± 7.1 | - | 1 |" in pages.summary(found, "images")
    assert "| rnp | 70.0 / 5.0 |" in pages.overview(found, 9)
    single = [c for c in found if c["trigger"] == "a"]
    assert "| rnp | 1 | 90.0 ± 0.0 |" in pages.summary(single, "images")
