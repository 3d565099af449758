"""Bad input: what is said about it, and that nothing is left of the attempt."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

from hf_purify import purify
from hf_purify.errors import PurifyError


@dataclass
class Case:
    """Settings of `purify` that replace good ones, some of them made when they are needed, and what is said about them."""

    error: type[PurifyError]
    message: str
    settings: dict[str, Any] = field(default_factory=dict)

    def check(self, folder: Path, **good: Any) -> None:
        """Raises AssertionError unless the case is refused in one line and leaves nothing in an empty folder.

        Args:
            good: settings that would do.
        """
        with pytest.raises(self.error, match=self.message) as caught:
            attempt(folder / "out", **good | self.settings)
        assert "\n" not in str(caught.value).strip()
        assert not list(folder.iterdir())


def attempt(output: Path, **settings: Any) -> None:
    """The shortest repair with these settings; a model and data may be given as what makes them."""
    for name in {"model", "clean", "test"} & settings.keys():
        value = settings[name]
        settings[name] = value() if isinstance(value, (FunctionType, type)) else value
    given = {"method": "random_mask", "device": "cpu"} | settings
    purify(given.pop("model"), given.pop("clean"), output=str(output), **given)
