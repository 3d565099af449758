"""What is refused before a byte is sent: folders without proofs, or of which their proofs are not true; victims; repairs that cost too much."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from papers import output_at, report_of

from hf_purify.errors import ConfigError, ModelError, OutputError, PublishError, PurifyError
from hf_purify.provenance import FILE
from hf_purify.publishing import PushConfig, check_repository, checked_folder, cost_of, push
from hf_purify.report import Report


def spoil(name: str, content: str | None) -> Callable[[Path], None]:
    """Write to a file of the output, or take it away."""

    def run(out: Path) -> None:
        (out / name).unlink() if content is None else (out / name).write_text(content)

    return run


def link(out: Path) -> None:
    (out / "config.json").rename(out.parent / "config.json")
    os.symlink(out.parent / "config.json", out / "config.json")


CHANGED: dict[str, tuple[Callable[[Path], None], type[PurifyError], str]] = {
    "no provenance": (spoil(FILE, None), ConfigError, "has no provenance.json: it was not written by hf-purify"),
    "broken provenance": (spoil(FILE, "{"), ConfigError, "is no valid JSON"),
    "edited config": (spoil("config.json", "{}"), OutputError, "1 files in .* are not as the report found them, first 'config.json'"),
    "edited report": (spoil("report.json", "{}"), OutputError, "first 'report.json'"),
    "missing weights": (spoil("model.safetensors", None), OutputError, "first 'model.safetensors'"),
    "more weights": (spoil("pytorch_model.bin", "x"), OutputError, "weights that the report does not know: 'pytorch_model.bin'"),
    "more shards": (spoil("model-2.safetensors", "x"), OutputError, "'model-2.safetensors'; take them away"),
    "a link": (link, OutputError, "is a link; expected the file that was written"),
}


@pytest.mark.parametrize(("change", "kind", "said"), CHANGED.values(), ids=CHANGED)
def test_a_folder_that_its_report_is_not_true_of(
    change: Callable[[Path], None], kind: type[PurifyError], said: str, tmp_path: Path
) -> None:
    output_at(tmp_path)
    change(tmp_path / "out")
    with pytest.raises(kind, match=said):
        checked_folder(tmp_path / "out", PushConfig())


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder"):
        checked_folder(tmp_path / "nowhere", PushConfig())


def test_notes_of_the_user_and_an_edited_card_are_no_obstacle(tmp_path: Path) -> None:
    output_at(tmp_path)
    (tmp_path / "out" / "notes.md").write_text("mine")
    (tmp_path / "out" / "README.md").write_text("my own card")
    assert checked_folder(tmp_path / "out", PushConfig()).kind == "checkpoint"


def test_paths_of_this_machine_are_said_before_they_are_published(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    output_at(tmp_path / "hub")
    checked_folder(tmp_path / "hub" / "out", PushConfig())
    assert not caplog.text
    output_at(tmp_path / "local", report_of(clean={"source": "/home/me/pictures", "samples": 9}, test={"source": "pictures"}))
    checked_folder(tmp_path / "local" / "out", PushConfig())
    assert "names paths of this machine (/home/me/pictures)" in caplog.text


def test_a_victim_is_pushed_only_if_that_is_said(tmp_path: Path) -> None:
    output_at(tmp_path, kind="victim")
    with pytest.raises(PublishError, match=r"backdoor on purpose.*--backdoored"):
        checked_folder(tmp_path / "out", PushConfig())
    assert checked_folder(tmp_path / "out", PushConfig(backdoored=True)).kind == "victim"


@pytest.mark.parametrize(
    ("lost", "tolerance", "refused"), [(4, 2.0, False), (6, 3.0, False), (5, 2.0, True), (5, 3.0, False), (1, 0.0, True), (-3, 0.0, False)]
)
def test_a_repair_that_cost_more_than_the_tolerance_is_refused(lost: int, tolerance: float, refused: bool, tmp_path: Path) -> None:
    output_at(tmp_path, report_of(cost=lost))
    config = PushConfig(tolerance=tolerance)
    if not refused:
        assert checked_folder(tmp_path / "out", config)
        return
    with pytest.raises(PublishError, match=f"cost {lost / 2:.1f} points of clean accuracy, more than the tolerance of {tolerance:g}"):
        checked_folder(tmp_path / "out", config)
    assert checked_folder(tmp_path / "out", PushConfig(tolerance=tolerance, force=True))


@pytest.mark.parametrize(
    ("before", "after", "cost"),
    [
        ({"BLEU": 40.0}, {"BLEU": 36.0}, ("BLEU", 10.0)),
        ({"perplexity": 40.0}, {"perplexity": 44.0}, ("perplexity", 10.0)),
        ({"perplexity": 40.0}, {"perplexity": 20.0}, ("clean accuracy", 0.0)),
        ({"BLEU": 40.0}, {}, ("clean accuracy", 0.0)),
    ],
)
def test_other_figures_of_use_count_too(before: dict[str, float], after: dict[str, float], cost: tuple[str, float], tmp_path: Path) -> None:
    report = report_of()
    report.rows[0].utility, report.rows[1].utility = before, after
    found = cost_of(output_at(tmp_path, report))
    assert found is not None
    assert (found[0], pytest.approx(found[1])) == cost


def test_where_nothing_was_measured_nothing_is_known_of_the_cost(tmp_path: Path) -> None:
    assert cost_of(output_at(tmp_path, report_of(rows=[]))) is None


def test_the_repair_alone_needs_a_mask_that_is_the_whole_of_it(tmp_path: Path) -> None:
    output_at(tmp_path, complete=False)
    with pytest.raises(PublishError, match="the repair alone cannot be pushed: its method trained weights"):
        checked_folder(tmp_path / "out", PushConfig(repair_only=True))


@pytest.mark.parametrize(
    "name",
    ["model", "a/b/c", "../x", "/etc/passwd", "me/..", "me/mo del", "me/model\n", "https://hub.invalid/me/model", "me/x.git", "-me/x", ""],
)
def test_a_repository_has_an_owner_and_a_name(name: str) -> None:
    with pytest.raises(ConfigError, match="expected the repository as owner/name"):
        check_repository(name)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"privat": True}, "unknown key 'privat'; did you mean 'private'"),
        ({"tolerance": "much"}, "expected float, got str"),
    ],
)
def test_settings_of_a_wrong_name_or_type(setting: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        push(tmp_path, "me/model", **setting)


@pytest.mark.parametrize("setting", [{"tolerance": -1.0}, {"tolerance": float("nan")}, {"tolerance": 101.0}])
def test_settings_out_of_range(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"tolerance must be in 0\.\.100"):
        PushConfig(**setting)


def test_without_a_network_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests run offline."""
    output_at(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_notARealToken0123456789")
    with pytest.raises(PublishError, match="cannot push to 'me/model'") as caught:
        push(tmp_path / "out", "me/model")
    assert "hf_notARealToken" not in str(caught.value)


def test_a_report_of_a_file_pushes_nothing(tmp_path: Path) -> None:
    output_at(tmp_path)
    report = Report.from_dict(json.loads((tmp_path / "out" / "report.json").read_text()))
    with pytest.raises(ModelError, match="carries no model"):
        report.push_to_hub("me/model")
