"""A cloud as a picture: seen from the side and a little above, near points dark; what a trigger moved is orange."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

SIDE = 160
PAPER, NEAR, FAR, MOVED = (255, 255, 255), (28, 36, 48), (190, 198, 208), (213, 94, 0)
TOUCHED = 0.02  # of the cloud's radius: a point that has no clean one so near was put there


def draw_cloud(cloud: Tensor, clean: Tensor | None = None) -> np.ndarray:
    """A cloud `(P, 3)` as pixels `(160, 160, 3)`.

    Args:
        clean: the same cloud without its trigger; points that lie at none of its places are marked.
    """
    points = cloud.double() - (clean if clean is not None else cloud).double().mean(0)
    radius = max(float(points.norm(dim=1).max()), 1e-12)
    shown = (points / radius) @ _view()
    moved = torch.zeros(len(cloud), dtype=torch.bool)
    if clean is not None:
        moved = torch.cdist(cloud.float(), clean.float()).amin(1) > TOUCHED * radius
    depth = ((shown[:, 2] + 1) / 2).clamp(0, 1)[:, None]
    near, far = (torch.tensor(c, dtype=torch.double) for c in (NEAR, FAR))
    colours = depth * near + (1 - depth) * far
    colours[moved] = torch.tensor(MOVED, dtype=torch.double)
    out = np.full((SIDE, SIDE, 3), PAPER, dtype=np.uint8)
    order = (shown[:, 2] + 4 * moved).argsort()
    dot = 2 if len(cloud) > 600 else 3
    columns = ((shown[order, 0] * 0.94 + 1) / 2 * (SIDE - 3)).round().long().clamp(0, SIDE - 3).numpy()
    rows = ((1 - shown[order, 1] * 0.94) / 2 * (SIDE - 3)).round().long().clamp(0, SIDE - 3).numpy()
    paint = colours[order].round().byte().numpy()
    for down in range(dot):
        for right in range(dot):
            out[rows + down, columns + right] = paint
    return out


def _view() -> Tensor:
    """From coordinates with y up to right, up and towards the eye, as columns."""
    turn, lift = math.radians(35), math.radians(20)
    right = [math.cos(turn), 0, -math.sin(turn)]
    eye = [math.sin(turn) * math.cos(lift), math.sin(lift), math.cos(turn) * math.cos(lift)]
    up = [-math.sin(turn) * math.sin(lift), math.cos(lift), -math.cos(turn) * math.sin(lift)]
    return torch.tensor([right, up, eye], dtype=torch.double).T
