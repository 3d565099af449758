"""A scene with the boxes that were seen on it, as pixels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import draw_bounding_boxes

from .outputs import Detections
from .scene import Scene

COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442", "#000000")  # Okabe and Ito (2008), by class
SIDE = 240  # pixels of the wider side


def draw_scene(scene: Scene, seen: Sequence[Detections] = ()) -> np.ndarray:
    """The picture with what is seen on it, `(H, W, 3)`: above before a repair, below after it. Without that, with what is there.

    A class has a colour, the same everywhere.
    """
    scale = SIDE / max(scene.image.shape[1:])
    height, width = (max(1, round(side * scale)) for side in scene.image.shape[1:])
    image = (
        F.interpolate(scene.image[None].float(), (height, width), mode="bilinear", antialias=True)[0].round().clamp(0, 255).to(torch.uint8)
    )
    sides = torch.tensor([width, height, width, height])
    panels = [_drawn(image, scene.objects.boxes * scale, scene.objects.categories)] if not seen else []
    panels += [_drawn(image, found.boxes * sides, found.categories) for found in (s.seen() for s in seen)]
    gap = torch.full((3, 3, width), 255, dtype=torch.uint8)
    parts = [part for panel in panels for part in (panel, gap)][:-1]
    return torch.cat(parts, 1).permute(1, 2, 0).numpy()


def _drawn(image: Tensor, boxes: Tensor, categories: Tensor) -> Tensor:
    if not len(boxes):
        return image
    colours = [COLOURS[int(c) % len(COLOURS)] for c in categories]
    limits = torch.tensor([image.shape[2] - 1, image.shape[1] - 1] * 2)
    return draw_bounding_boxes(image, boxes.clamp(min=0).minimum(limits), colors=colours, width=3)
