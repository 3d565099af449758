"""Figures against published numbers and brute force, and their `evaluate` shells against them."""

from __future__ import annotations

import math
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_purify_hub_cards
from hf_purify import metrics
from hf_purify.errors import DataError
from hf_purify.metrics import (
    Proportion,
    attack_success_rate,
    clean_accuracy,
    defense_effectiveness_rating,
    mcnemar,
    robust_accuracy,
    wilson,
)

SHELLS = Path(hf_purify_hub_cards.__file__).parent / "metrics"
classes = st.integers(0, 3)
samples = st.lists(st.tuples(classes, classes, classes), min_size=1, max_size=40)


# Wilson interval


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_as_published(hits: int, n: int, low: float, high: float) -> None:
    """R. G. Newcombe, Statistics in Medicine 17, 1998, table I, method 3."""
    assert [round(x, 4) for x in wilson(hits, n)] == [low, high]


@given(n=st.integers(1, 5000), share=st.floats(0, 1))
def test_wilson_ends_solve_the_score_equation(n: int, share: float) -> None:
    hits = round(share * n)
    z = 1.959963984540054
    p = hits / n
    roots = sorted(np.roots([1 + z * z / n, -(2 * p + z * z / n), p * p]).real)
    assert wilson(hits, n) == pytest.approx((max(0, roots[0]), min(1, roots[1])), abs=1e-6)


def test_wilson_covers_as_often_as_it_says() -> None:
    n = 60
    for p in (0.02, 0.1, 0.5, 0.93):
        inside = sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1) if wilson(k, n)[0] <= p <= wilson(k, n)[1])
        assert 0.92 < inside < 0.99


def test_wilson_at_the_edges() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert all(wilson(0, n)[0] == 0 and wilson(n, n)[1] == 1 for n in range(1, 300)), "exactly"
    low, high = wilson(30, 100, confidence=0.99)
    assert low < wilson(30, 100)[0]
    assert high > wilson(30, 100)[1]


def test_proportion_says_what_it_counted() -> None:
    share = Proportion(81, 263)
    assert share.value == 81 / 263
    assert str(share) == "30.8 % [25.5, 36.6] (n=263)"
    assert str(Proportion(0, 0)) == "nothing to count (n=0)"
    assert share.to_dict() == {"hits": 81, "n": 263, "value": 81 / 263, "low": share.interval[0], "high": share.interval[1]}
    nothing = Proportion(0, 0)
    assert math.isnan(nothing.value)
    assert nothing.to_dict()["value"] is None


# Shares of samples


@given(samples)
def test_shares_as_counted_by_hand(rows: list[tuple[int, int, int]]) -> None:
    predictions, labels, targets = (torch.tensor(column) for column in zip(*rows, strict=True))
    other = [(p, y, t) for p, y, t in rows if y != t]
    assert clean_accuracy(predictions, labels) == Proportion(sum(p == y for p, y, _ in rows), len(rows))
    assert attack_success_rate(predictions, labels, targets) == Proportion(sum(p == t for p, _, t in other), len(other))
    assert robust_accuracy(predictions, labels, targets) == Proportion(sum(p == y for p, y, _ in other), len(other))


def test_samples_of_the_target_class_do_not_count() -> None:
    predictions, labels, targets = [0, 0, 0, 1], [0, 0, 1, 1], [0, 0, 0, 0]
    assert attack_success_rate(predictions, labels, targets) == Proportion(1, 2)
    assert robust_accuracy(predictions, labels, targets) == Proportion(1, 2)
    assert attack_success_rate([0], [0], [0]).n == 0


# DER


def test_der_at_its_landmarks() -> None:
    assert defense_effectiveness_rating(1, 0, 0.9, 0.9) == 1.0
    assert defense_effectiveness_rating(1, 1, 0.9, 0.9) == 0.5
    assert defense_effectiveness_rating(0.5, 1, 1, 0) == 0.0
    assert defense_effectiveness_rating(1, 0, 0.9, 0.95) == 1.0, "a gain in accuracy counts for nothing"
    assert defense_effectiveness_rating(0.9502, 0.0145, 0.9132, 0.8921) == pytest.approx((0.9357 - 0.0211 + 1) / 2)


@given(st.tuples(*[st.floats(0, 1)] * 4))
def test_der_stays_in_its_range(run: tuple[float, float, float, float]) -> None:
    assert 0 <= defense_effectiveness_rating(*run) <= 1


# McNemar


def outcome(first_only: int, second_only: int, both: int = 3, neither: int = 2) -> tuple[list[int], list[int], list[int]]:
    """Predictions of two models and labels, with so many samples of each kind."""
    first = [1] * first_only + [0] * second_only + [1] * both + [0] * neither
    second = [0] * first_only + [1] * second_only + [1] * both + [0] * neither
    return first, second, [1] * len(first)


@pytest.mark.parametrize(
    ("first_only", "second_only", "p"),
    [(0, 5, 0.0625), (5, 0, 0.0625), (1, 9, 22 / 1024), (10, 10, 1.0), (0, 0, 1.0), (0, 1, 1.0), (2, 8, 112 / 1024)],
)
def test_mcnemar_by_hand(first_only: int, second_only: int, p: float) -> None:
    assert mcnemar(*outcome(first_only, second_only)) == pytest.approx(p)


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 5))
def test_mcnemar_is_twice_the_binomial_tail(first_only: int, second_only: int, both: int) -> None:
    n = first_only + second_only
    tail = sum(math.comb(n, k) for k in range(min(first_only, second_only) + 1)) / 2**n
    assert mcnemar(*outcome(first_only, second_only, both)) == pytest.approx(min(1.0, 2 * tail))


def test_mcnemar_counts_two_wrong_answers_as_equal() -> None:
    assert mcnemar([1, 2, 3], [2, 3, 1], [0, 0, 0]) == 1.0


# `evaluate` shells


def load(name: str) -> evaluate.Metric:
    return evaluate.load(str(SHELLS / name), keep_in_memory=True)


def test_every_folder_is_a_module_with_a_card() -> None:
    names = sorted(path.name for path in SHELLS.iterdir() if path.is_dir() and path.name != "__pycache__")
    assert names
    for name in names:
        module = load(name)
        assert module.module_type == "metric"
        assert module.name == name, "the class is named after the folder"
        _, header, body = (SHELLS / name / "README.md").read_text(encoding="utf-8").split("---\n", 2)
        card = yaml.safe_load(header)
        assert {"evaluate", "metric"} <= set(card["tags"])
        assert card["sdk"] == "gradio"
        assert card["title"]
        assert card["description"].strip()
        assert f'evaluate.load("{name}")' in body
        for column in module.features:
            assert f"**{column}**" in body, f"{name}: the card does not explain {column}"
        assert module.citation
        assert module.inputs_description


def test_shells_of_shares() -> None:
    generator = torch.Generator().manual_seed(0)
    predictions, labels, targets = torch.randint(0, 4, (3, 100), generator=generator)
    columns = {"predictions": predictions, "references": labels}
    for name, given_columns in (
        ("clean_accuracy", columns),
        ("attack_success_rate", columns | {"targets": targets}),
        ("robust_accuracy", columns | {"targets": targets}),
    ):
        share = getattr(metrics, name)(*given_columns.values())
        result = load(name).compute(**given_columns)
        assert result == {name: share.value, "low": share.interval[0], "high": share.interval[1], "n": share.n}
        assert 0 < share.value < 1


def test_shells_add_up_batches() -> None:
    module = load("attack_success_rate")
    for _ in range(3):
        module.add_batch(predictions=[0, 0], references=[0, 1], targets=[0, 0])
    result = module.compute()
    assert result["n"] == 3
    assert result["attack_success_rate"] == 1.0


def test_shell_with_nothing_to_count() -> None:
    result = load("robust_accuracy").compute(predictions=[0], references=[0], targets=[0])
    assert math.isnan(result["robust_accuracy"])
    assert (result["low"], result["high"], result["n"]) == (0.0, 1.0, 0)


def test_shell_of_der() -> None:
    module = load("defense_effectiveness_rating")
    runs = {"asr_before": [1.0, 0.9], "asr_after": [0.02, 0.9], "acc_before": [0.93, 0.92], "acc_after": [0.91, 0.93]}
    expected = sum(defense_effectiveness_rating(*run) for run in zip(*runs.values(), strict=True)) / 2
    assert module.compute(**runs) == {"defense_effectiveness_rating": pytest.approx(expected), "n": 2}
    assert expected == pytest.approx((0.98 + 0.5) / 2)
    with pytest.raises(DataError, match=r"asr_after must be shares in 0..1, got 2; divide percentages by 100"):
        module.compute(**(runs | {"asr_after": [0.5, 2.0]}))


def test_shell_of_mcnemar() -> None:
    first, second, labels = outcome(1, 9)
    result = load("mcnemar_test").compute(predictions_before=first, predictions_after=second, references=labels)
    assert result == {"p_value": pytest.approx(22 / 1024), "n": 15}
