"""What is done to pixels: augmentation, and the way back from a model's input. Shared by the modalities."""

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


def restored(inputs: Tensor, prepared: Tensor, raws: list[Tensor]) -> Tensor:
    """Model inputs `(..., C, h, w)` as uint8 pixels, by the scale and shift of each channel that lead from prepared samples back to raw ones.

    A processor may do anything; what most do, a normalization of channels, is told from their means and spreads.

    Args:
        prepared: `(n, ..., C, h, w)` some samples as the model gets them.
        raws: the same ones as the data set holds them, `(..., C, H, W)` of uint8.
    """
    known = prepared.float().movedim(-3, 0).flatten(1)
    pixels = torch.cat([raw.float().movedim(-3, 0).flatten(1) for raw in raws], 1)
    scale = pixels.std(1) / known.std(1).clamp_min(1e-9)
    shift = pixels.mean(1) - scale * known.mean(1)
    found = inputs.detach().float().cpu() * scale[:, None, None] + shift[:, None, None]
    return found.round().clamp(0, 255).to(torch.uint8)
