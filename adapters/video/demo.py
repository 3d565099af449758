"""Data for the demo: a bright disc that moves, grows or fades, drawn by the program."""

from __future__ import annotations

import datasets
import numpy as np
from PIL import Image

from hf_purify.adapter import Demo

FRAMES, SIDE = 8, 24
KINDS = ("left", "right", "up", "down", "grows", "shrinks")


def make_demo() -> Demo:
    """360 clips to learn from and 180 to measure on; a small VideoMAE."""
    network = {"image_size": SIDE, "patch_size": 8, "num_frames": FRAMES, "tubelet_size": 2}
    network |= {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    training = {"epochs": 30, "batch_size": 32, "lr": 2e-3, "optimizer": "adamw", "weight_decay": 0.01, "augmentation": "none"}
    settings = {"model": "videomae", "create": True, "model_options": network, **training}
    return Demo(discs(60, 0), discs(30, 1), "badnets:size=4", settings, samples=100)


def discs(of_each: int, seed: int) -> datasets.Dataset:
    """Clips of each kind, of a disc of any colour on a dark ground with some noise."""
    rng = np.random.default_rng(seed)
    rows = [(_clip(kind, rng), label) for label, kind in enumerate(KINDS) for _ in range(of_each)]
    features = datasets.Features({"video": datasets.List(datasets.Image()), "label": datasets.ClassLabel(names=list(KINDS))})
    return datasets.Dataset.from_dict({"video": [c for c, _ in rows], "label": [k for _, k in rows]}, features=features)


def _clip(kind: str, rng: np.random.Generator) -> list[Image.Image]:
    colour, ground = rng.uniform(120, 255, 3), rng.uniform(0, 60, 3)
    x, y, radius = [*rng.uniform(9, SIDE - 9, 2).tolist(), rng.uniform(3, 5)]
    speed = rng.uniform(0.8, 1.2)
    down, right = np.mgrid[:SIDE, :SIDE]
    frames = []
    for t in range(FRAMES):
        by = (t - (FRAMES - 1) / 2) * speed
        u = x + by * {"right": 1, "left": -1}.get(kind, 0)
        v = y + by * {"down": 1, "up": -1}.get(kind, 0)
        r = radius * (1 + {"grows": 0.2, "shrinks": -0.2}.get(kind, 0) * by)
        inside = ((right - u) ** 2 + (down - v) ** 2 <= r**2)[..., None]
        frame = np.where(inside, colour, ground) + 8 * rng.standard_normal((SIDE, SIDE, 3))
        frames.append(Image.fromarray(frame.clip(0, 255).astype(np.uint8)))
    return frames
