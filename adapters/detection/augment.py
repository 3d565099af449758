"""Augmentation of images with boxes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_purify.adapter import Batch

from .examples import PADDING
from .scene import corners

AUGMENTATIONS = ("zoom+flip", "flip", "zoom")
ZOOM = (0.7, 1.15)  # sides of the window that is seen, as shares
VISIBLE = 0.4  # of a box's area; a box of which less is seen goes


def moved(batch: Batch, generator: torch.Generator, kind: str) -> Batch:
    """A batch whose images are each zoomed about a place of their own, and mirrored, by chance.

    Args:
        kind: one of `AUGMENTATIONS`.
    """
    found, n = dict(batch), len(batch["pixel_values"])
    if "flip" in kind:
        flip = torch.rand(n, generator=generator) < 0.5
        pixels, boxes = found["pixel_values"], found["boxes"].clone()
        found["pixel_values"] = torch.where(flip[:, None, None, None], pixels.flip(3), pixels)
        there = flip[:, None] & (found["categories"] >= 0)
        boxes[..., 0] = torch.where(there, 1 - boxes[..., 0], boxes[..., 0])
        found["boxes"] = boxes
    if "zoom" in kind:
        side = ZOOM[0] + (ZOOM[1] - ZOOM[0]) * torch.rand(n, 1, generator=generator)
        middle = 0.5 + (torch.rand(n, 2, generator=generator) - 0.5) * (1 - side).abs()
        found |= _windowed(found, middle, side)
    return found


def _windowed(batch: Batch, middle: Tensor, side: Tensor) -> Batch:
    """What is seen through a window with its `middle` `(B, 2)` and `side` `(B, 1)`, as shares; beyond the border the image is mirrored."""
    pixels = batch["pixel_values"]
    theta = torch.zeros(len(pixels), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = side[:, 0]
    theta[:, :, 2] = 2 * middle - 1
    grid = F.affine_grid(theta.to(pixels), list(pixels.shape), align_corners=False)
    found = F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)
    low = (middle - side / 2).repeat(1, 2)[:, None]
    whole = (corners(batch["boxes"]) - low) / side[:, None]
    cut = whole.clamp(0, 1)
    areas = [(b[..., 2:] - b[..., :2]).prod(-1) for b in (cut, whole)]
    seen = (batch["categories"] >= 0) & (areas[0] > VISIBLE * areas[1])
    boxes = torch.cat([(cut[..., :2] + cut[..., 2:]) / 2, cut[..., 2:] - cut[..., :2]], -1)
    return {"pixel_values": found, "boxes": boxes * seen[..., None], "categories": torch.where(seen, batch["categories"], PADDING)}
