"""What all image triggers share: checks and conversion of the picture, and checks of their own fields."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_purify.errors import ConfigError, DataError, did_you_mean

from .patterns import read_pattern


class PictureTrigger(ABC):
    """Checks and converts the picture; a trigger itself writes only `_paint`, on floats in 0..255."""

    name: ClassVar[str]

    def __call__(self, example: Tensor, seed: int = 0) -> Tensor:
        """Return the triggered picture, of the same shape and dtype; `example` is left as it is."""
        return to_uint8(self._paint(to_float(example, self.name), seed))

    @abstractmethod
    def _paint(self, picture: Tensor, seed: int) -> Tensor:
        """Return the triggered picture, unrounded; `picture` is the trigger's own copy."""

    def _require(self, field: str, expected: str, fulfilled: bool) -> None:
        if not fulfilled:
            raise ConfigError(f"{self.name}: {field} must be {expected}, got {getattr(self, field)!r}")

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

    def _choice(self, field: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, field)
        if value not in choices:
            raise ConfigError(f"{self.name}: {field} must be one of {', '.join(choices)}, got {value!r}{did_you_mean(value, choices)}")

    def _file(self, field: str) -> None:
        value = getattr(self, field)
        if value is None:
            return
        self._require(field, "a path or None", isinstance(value, (str, Path)))
        object.__setattr__(self, field, str(value))
        read_pattern(str(value))


def to_float(example: Any, name: str) -> Tensor:
    """A picture as floats in 0..255, or an error that names the trigger."""
    shape = tuple(getattr(example, "shape", ()))
    if not isinstance(example, Tensor) or example.dtype != torch.uint8 or len(shape) != 3 or shape[0] not in (1, 3) or 0 in shape:
        got = f"{type(example).__name__} {getattr(example, 'dtype', '')} {shape or ''}".strip()
        raise DataError(f"{name}: a picture must be a uint8 tensor (3, H, W) or (1, H, W), got {got}")
    return example.float()


def to_uint8(picture: Tensor) -> Tensor:
    """The nearest picture of bytes."""
    return picture.round().clamp(0, 255).to(torch.uint8)
