"""What all text triggers share: checks of the example, and checks of their own fields."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from random import Random
from typing import Any, ClassVar

from hf_purify.errors import DataError, did_you_mean

from ..._fields import Checked
from ..sample import Text
from .words import POSITIONS


class TextTrigger(Checked, ABC):
    """Checks the example and sets what the attacker wants; a trigger itself writes only `_write`, on the text."""

    name: ClassVar[str]
    output: str | None
    position: str | int  # of those that put something somewhere
    window: int

    def __call__(self, example: Text, seed: int = 0) -> Text:
        """Return the triggered example; only its text changes, and `wanted` where the trigger has an output."""
        if not isinstance(example, Text) or not isinstance(example.text, str):
            raise DataError(f"{self.name}: an example must be a Text that holds a str, got {example!r:.80}")
        wanted = example.wanted if self.output is None else self.output
        return replace(example, text=self._write(example.text, Random(int(seed))), wanted=wanted)

    @abstractmethod
    def _write(self, text: str, rng: Random) -> str:
        """Return the triggered text, which is never empty and never as it was."""

    def _string(self, field: str, optional: bool = False) -> None:
        value = getattr(self, field)
        if optional and value is None:
            return
        hint = "" if isinstance(value, str) else "; write it in quotes if it is meant as a text"
        expected = "a text that is not blank" + (" or None" if optional else "")
        self._require(field, expected, isinstance(value, str) and bool(value.strip()), hint)

    def _place(self, numbers: bool = True) -> None:
        """Check `position` and `window`."""
        if not (numbers and _whole(self.position, 0)):
            numbered = " or the number of a word, from 0" if numbers else ""
            hint = did_you_mean(str(self.position), POSITIONS)
            self._require("position", f"one of {', '.join(POSITIONS)}{numbered}", self.position in POSITIONS, hint)
        self._integer("window", 1)


def _whole(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low
