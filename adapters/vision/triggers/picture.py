"""What all image triggers share: checks and conversion of the picture, and checks of their own fields."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_purify.errors import DataError

from ..._fields import Checked
from .patterns import read_pattern


class PictureTrigger(Checked, ABC):
    """Checks and converts the picture; a trigger itself writes only `_paint`, on floats in 0..255."""

    name: ClassVar[str]

    def __call__(self, example: Tensor, seed: int = 0) -> Tensor:
        """Return the triggered picture, of the same shape and dtype; `example` is left as it is."""
        return to_uint8(self._paint(to_float(example, self.name), seed))

    @abstractmethod
    def _paint(self, picture: Tensor, seed: int) -> Tensor:
        """Return the triggered picture, unrounded; `picture` is the trigger's own copy."""

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
