"""The populations that scans were calibrated on, and what is committed of them."""

from __future__ import annotations

import importlib
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from hf_purify.calibration import Calibration
from hf_purify.registry import find
from hf_purify.specs import parse_spec
from hf_purify_recipes import calibrate, scans
from hf_purify_recipes.populations import PARTS, of_part

MODALITIES = ("vision", "text")
both = pytest.mark.parametrize("modality", MODALITIES)


def folder(modality: str) -> Path:
    return Path(str(files(f"hf_purify_recipes.{modality}")))


def cells(modality: str) -> list[dict[str, Any]]:
    return json.loads((folder(modality) / "scans.json").read_text("utf-8"))


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_PURIFY_DATA", str(tmp_path))  # members know where their data lie; nothing is read


@both
@pytest.mark.usefixtures("data")
def test_members_have_names_and_triggers_of_their_own(modality: str) -> None:
    members = importlib.import_module(f"hf_purify_recipes.{modality}.population").members()
    assert len({m.name for m in members}) == len(members)
    known = find("adapter", modality)().triggers()
    for member in members:
        assert all(parse_spec(t)[0] in known for t in member.triggers)
        assert member.backdoored is bool(member.targets)
    assert [m.part for m in of_part(members)] == sorted((m.part for m in members), key=PARTS.index)
    assert not {m.triggers for m in of_part(members, "held-out")} & {m.triggers for m in of_part(members, "calibrate") if m.triggers} - {
        ()
    } - ({m.triggers for m in members if getattr(m, "foreign", False)})


@both
@pytest.mark.usefixtures("data")
def test_every_member_was_scanned_and_nothing_else(modality: str) -> None:
    members = {m.name: m for m in importlib.import_module(f"hf_purify_recipes.{modality}.population").members()}
    found = {c["name"]: c for c in cells(modality)}
    assert found.keys() == members.keys()
    for name, member in members.items():
        cell = found[name]
        assert (cell["kind"], cell["targets"], cell["part"]) == (member.kind, list(member.targets), member.part)
        assert (cell["data"], cell["rule"], cell["calibrates"]) == (member.dataset, member.rule, member.calibrates)


@both
def test_the_calibration_is_what_the_scans_make(modality: str) -> None:
    made = calibrate.fit(cells(modality))
    kept = find("adapter", modality)().calibration()
    assert kept is not None
    assert kept.signals.keys() == made.signals.keys()
    for name, null in made.signals.items():
        assert (kept.signals[name].n, kept.signals[name].mean) == (null.n, pytest.approx(null.mean))
    assert kept.combined.std == pytest.approx(made.combined.std)
    assert dict(kept.facts) == calibrate.facts(cells(modality))


@both
def test_the_page_is_what_the_scans_make(modality: str) -> None:
    assert (folder(modality) / "SCANS.md").read_text("utf-8") == scans.page(modality, cells(modality))


@both
def test_no_backdoored_model_has_a_part_in_the_calibration(modality: str) -> None:
    found = cells(modality)
    clean = [c for c in found if c["calibrates"]]
    assert not any(c["backdoored"] for c in clean)
    assert calibrate.fit(clean) == calibrate.fit(found)
    assert calibrate.fit(found).combined.n == len(clean)


def test_data_of_another_kind_and_several_targets_have_tables_of_their_own() -> None:
    found = cells("vision")
    page = scans.page("vision", found)
    rates, later = page.split("## By trigger")
    assert "digits" not in rates
    kinds = later.split("## Data of another kind")[1].split("## ")[0]
    assert all(c["name"] in kinds for c in found if c["data"] == "digits" and len(c["targets"]) < 2)
    several = later.split("## Several targets")[1].split("## ")[0]
    assert all(c["name"] in several for c in found if len(c["targets"]) > 1)


def test_a_clean_model_is_judged_without_itself() -> None:
    found = [
        {"name": str(i), "backdoored": False, "calibrates": True, "statistics": {"patch": x}}
        for i, x in enumerate((0.1, 0.2, 0.15, 0.12, 0.18, 3.0))
    ]
    scores = calibrate.left_out(found)
    whole = Calibration.fit([c["statistics"] for c in found])
    assert scores["5"] > 0.99
    assert whole.score({"patch": 3.0}) < scores["5"]
