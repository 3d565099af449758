"""Augmentation of what is made of pixels. Shared by the modalities."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

AUGMENTATIONS = ("crop+flip", "flip", "crop")


def moved(images: Tensor, generator: torch.Generator, kind: str) -> Tensor:
    """Images `(n, C, H, W)`, each shifted and mirrored by chance: cropped after padding by an eighth of the side, flipped horizontally.

    Args:
        kind: one of `AUGMENTATIONS`.
    """
    n, _, height, width = images.shape
    pad = max(1, min(height, width) // 8) if "crop" in kind else 0
    shifts = torch.randint(0, 2 * pad + 1, (2, n), generator=generator)
    padded = F.pad(images, (pad,) * 4)
    rows = shifts[0][:, None] + torch.arange(height)
    columns = shifts[1][:, None] + torch.arange(width)
    if "flip" in kind:
        flip = torch.rand(n, generator=generator) < 0.5
        columns = torch.where(flip[:, None], columns.flip(1), columns)
    index = torch.arange(n)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
