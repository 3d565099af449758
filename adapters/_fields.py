"""What triggers ask of their own fields. Shared by the modalities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from hf_purify.errors import ConfigError, did_you_mean


class Checked:
    """Checks of fields, each an error that names the trigger, what was expected and what came."""

    name: ClassVar[str]

    def _require(self, field: str, expected: str, fulfilled: bool, hint: str = "") -> None:
        if not fulfilled:
            raise ConfigError(f"{self.name}: {field} must be {expected}, got {getattr(self, field)!r}{hint}")

    def _integer(self, field: str, low: int, high: int | None = None, optional: bool = False) -> None:
        value = getattr(self, field)
        if optional and value is None:
            return
        whole = isinstance(value, int) and not isinstance(value, bool)
        expected = f"an integer of at least {low}" if high is None else f"an integer in {low}..{high}"
        self._require(field, expected + (" or None" if optional else ""), whole and low <= value and (high is None or value <= high))

    def _number(self, field: str, high: float = math.inf) -> None:
        value = getattr(self, field)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        expected = "a number above 0" if high == math.inf else f"a number in (0, {high:g}]"
        self._require(field, expected, number and 0 < value <= high and math.isfinite(value))

    def _choice(self, field: str, choices: Sequence[str]) -> None:
        value = getattr(self, field)
        known = isinstance(value, str) and value in choices
        self._require(field, f"one of {', '.join(choices)}", known, did_you_mean(value, choices))
