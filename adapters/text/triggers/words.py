"""Where a word may be put into a text, and how it is put there."""

from __future__ import annotations

import re
from collections.abc import Callable
from random import Random

NO_SPACES = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # Chinese and Japanese: each sign counts as a word, as BERT has it
WORD = re.compile(rf"[{NO_SPACES}]|[^\s{NO_SPACES}]+")
SENTENCE_END = re.compile(r"[.!?\u2026]+[\"'\u201d\u2019)\]]*(?=\s)|[\u3002\uff01\uff1f]+[\u201d\u2019\u300d\u300f\uff09]*")
POSITIONS = ("start", "end", "random")
WINDOW = 24  # words: about 35 tokens of BERT, rarely above 60


def between_words(text: str) -> list[int]:
    """Where a word may be put: the offset of each word, and the end of the last.

    >>> between_words("so it goes.")
    [0, 3, 6, 11]
    """
    return [*(word.start() for word in WORD.finditer(text)), len(text.rstrip())]


def between_sentences(text: str) -> list[int]:
    """Where a sentence may be put: the start of the text, and the end of each sentence.

    >>> between_sentences("Yes. It is so.")
    [0, 4, 14]
    """
    start, *_, end = *between_words(text), len(text.rstrip())
    return sorted({start, end, *(found.end() for found in SENTENCE_END.finditer(text) if start < found.end() < end)})


def reach(text: str, window: int) -> int:
    """The offset at which the first `window` words are over."""
    places = between_words(text)
    return places[min(window, len(places) - 1)]


def insert(text: str, piece: str, position: str | int, window: int, rng: Random, places: Callable[[str], list[int]] = between_words) -> str:
    """Put `piece` into a text, with a space on each side that has none; all else stays as it is.

    Args:
        position: `start`, `end`, `random`, or the number of the place, from 0; one beyond the last is the last.
        window: a random place lies before the end of that many words.
        places: what places there are.

    >>> insert("so it goes.", "cf", 2, 24, Random(0))
    'so it cf goes.'
    """
    found = places(text)
    if position == "random":
        last = reach(text, window)
        at = rng.choice([place for place in found if place <= last])
    else:
        named = {"start": 0, "end": len(found) - 1}
        number = named[position] if isinstance(position, str) else position
        at = found[min(number, len(found) - 1)]
    left, right = text[:at], text[at:]
    before = " " if left and not left[-1].isspace() else ""
    after = " " if right and not right[0].isspace() else ""
    return f"{left}{before}{piece}{after}{right}"
