"""How odd a model is beside clean ones."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from hf_purify.calibration import FILE, Calibration, Null
from hf_purify.errors import ConfigError
from hf_purify.registry import find, names


def population(models: int, seed: int, shift: float = 0.0) -> list[dict[str, float]]:
    draw = random.Random(seed)
    return [{"patch": draw.gauss(0.2 + shift, 0.06), "warp": draw.gauss(0.5, 0.2)} for _ in range(models)]


def test_a_further_clean_model_is_called_odd_as_often_as_promised() -> None:
    """Few models, so that a normal with the sample's own spread would promise too much."""
    called, models = 0, 0
    for seed in range(400):
        null = Null.of([c["patch"] for c in population(6, seed)])
        for c in population(5, 10_000 + seed):
            called += null.chance(c["patch"]) < 0.05
            models += 1
    assert 0.035 < called / models < 0.065, "Student's prediction, with six models"


def test_the_score_of_the_oddest_signal_keeps_its_promise() -> None:
    called, models = 0, 0
    for seed in range(120):
        made = Calibration.fit(population(8, seed))
        for c in population(5, 10_000 + seed):
            called += made.score(c) > 0.9
            models += 1
    assert called / models < 0.13


def test_a_model_far_from_the_clean_ones_is_told() -> None:
    made = Calibration.fit(population(8, 0))
    assert all(made.score(c) > 0.99 for c in population(5, 1, shift=1.0))


def test_the_line_of_a_signal_is_where_it_alone_gives_the_score() -> None:
    made = Calibration.fit(population(8, 0))
    line = made.line("patch", 0.95)
    assert line is not None
    assert made.score({"patch": line}) == pytest.approx(0.95)
    assert made.line("words", 0.95) is None


def test_chance_and_value_are_inverse() -> None:
    null = Null(0.3, 0.1, 9)
    assert null.chance(null.value_at(0.02)) == pytest.approx(0.02)


def test_a_signal_that_a_model_lacks_says_nothing() -> None:
    made = Calibration.fit(population(8, 0))
    assert made.score({}) == made.score({"unknown": 99.0})
    assert made.score({}) < 0.9


@pytest.mark.parametrize("values", [[], [0.1], [0.1, 0.1, 0.1]], ids=str)
def test_too_few_models_are_no_null(values: list[float]) -> None:
    with pytest.raises(ConfigError, match="two clean models"):
        Null.of(values)


def test_it_is_kept_and_read(tmp_path: Path) -> None:
    made = Calibration.fit(population(8, 0), {"models": 8})
    made.save(tmp_path / FILE)
    assert Calibration.beside(str(tmp_path / "module.py")) == made
    assert Calibration.beside(str(tmp_path / "other" / "module.py")) is None


@pytest.mark.parametrize("content", [{}, {"format": "other"}, {"format": "hf-purify-calibration/1", "signals": {}}], ids=str)
def test_another_file_is_refused(tmp_path: Path, content: dict[str, str]) -> None:
    (tmp_path / FILE).write_text(json.dumps(content))
    with pytest.raises(ConfigError):
        Calibration.read(tmp_path / FILE)


def test_what_comes_with_adapters_can_be_read_and_names_their_own_signals() -> None:
    for name in names("adapter"):
        adapter = find("adapter", name)()
        made = adapter.calibration()
        if made is not None:
            assert set(made.signals) <= set(adapter.stand_ins(adapter.tiny().loaded.model))
            assert made.combined.n >= 4
    assert find("adapter", "vision")().calibration() is not None
    assert find("adapter", "text")().calibration() is not None
