"""What the page of a scan draws: bars on one scale, strips of neurons, thumbnails, and the words that a trigger added."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from diagnoses import make_diagnosis

from hf_purify.diagnosis import Signal
from hf_purify.scan_page import marked
from hf_purify.scan_pictures import BUDGET, Gallery, bars_of, strip


def test_bars_are_proportional_and_the_line_is_on_their_scale() -> None:
    drawn = bars_of(make_diagnosis(), Signal("s", "", [1.0, -1.0, 4.0, 0.0], 2.0))
    starts, lengths = ([getattr(b, k) for b in drawn.bars] for k in ("start", "length"))
    zero = starts[0]
    assert starts[1] == 0
    assert lengths[1] == pytest.approx(zero)
    assert lengths[2] == pytest.approx(4 * lengths[0], abs=0.05)
    assert lengths[3] == 0
    assert drawn.line == pytest.approx(zero + 2 * lengths[0], abs=0.05)
    assert starts[2] + lengths[2] <= 100
    assert [b.above for b in drawn.bars] == [False, False, True, False]
    assert drawn.marks == ""


@pytest.mark.parametrize("line", [None, 0.0, 3.0])
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0])
def test_bars_of_equal_values(value: float, line: float | None) -> None:
    drawn = bars_of(make_diagnosis(), Signal("s", "", [value, value], line))
    assert all(0 <= b.start <= b.start + b.length <= 100 for b in drawn.bars)


def test_of_many_classes_the_highest_have_bars_and_the_targets() -> None:
    values = np.random.default_rng(0).permutation(1000).astype(float).tolist()
    found = dataclasses.replace(make_diagnosis(), targets=[values.index(3.0)])
    drawn = bars_of(found, Signal("s", "", values, 990.0))
    assert [b.value for b in drawn.bars] == [*map(float, range(999, 979, -1)), 3.0]
    assert [b.target for b in drawn.bars] == [False] * 20 + [True]
    assert sum(b.above for b in drawn.bars) == 9
    assert drawn.marks.count("M") > 900
    text = dataclasses.replace(found, labels=[], signals=[Signal("s", "", values, 990.0)]).to_html()
    assert "of 1,000 classes" in text
    assert text.count('<th scope="row">') < 80


@pytest.mark.parametrize(
    ("neurons", "size", "path"),
    [
        ([], 4, ""),
        ([2, 0], 4, "M0 0h25v10h-25zM50 0h25v10h-25z"),
        ([9], 4, ""),
        ([1999], 2000, "M99.75 0h0.25v10h-0.25z"),
        ([3, 1, 2], 4, "M25 0h75v10h-75z"),
        ([], 0, ""),
    ],
)
def test_strips(neurons: list[int], size: int, path: str) -> None:
    assert strip(neurons, size) == path


def test_pictures_shrink_until_they_fit() -> None:
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 255, (512, 300, 3), dtype=np.uint8) for _ in range(40)]
    gallery = Gallery([*noise, None])
    thumbs = [gallery(one) for one in noise]
    assert sum(len(thumb.data) for thumb in thumbs) <= BUDGET
    assert thumbs[0].height > thumbs[0].width > 30
    assert gallery(None) is None


@pytest.mark.parametrize("shape", [(28, 28), (28, 28, 1), (20, 60, 3), (1, 1)])
def test_pictures_of_every_shape(shape: tuple[int, ...]) -> None:
    one = np.zeros(shape, np.uint8)
    thumb = Gallery([one])(one)
    assert (thumb.height, thumb.width) == shape[:2]


@pytest.mark.parametrize(
    ("clean", "triggered", "pieces"),
    [
        ("a b c", "a b c", ["a b c"]),
        ("a b c", "a b cf c", ["a b ", "*cf", " c"]),
        ("a b c d", "x a b c y d", ["*x", " a b c ", "*y", " d"]),
        ("", "cf", ["*cf"]),
        ("cf", "", []),
        ("这部电影很好", "这部电cf影很好", ["这部电", "*cf", "影很好"]),
    ],
)
def test_new_words_are_marked(clean: str, triggered: str, pieces: list[str]) -> None:
    assert ["*" * piece.new + piece.text for piece in marked(clean, triggered)] == pieces


def test_of_a_long_text_the_change_is_shown() -> None:
    words = [f"w{i}" for i in range(20_000)]
    pieces = marked(" ".join(words[:9000]), " ".join([*words[:5000], "cf", *words[5000:9000]]))
    assert [piece.text.strip() for piece in pieces if piece.new] == ["cf"]
    assert (pieces[0].text, pieces[-1].text) == ("\u2026 ", " \u2026")
    assert sum(len(piece.text) for piece in pieces) < 2000
    assert sum(len(piece.text) for piece in marked("", "x" * 10**6)) < 100
