"""Data for the demo: scenes of drawn shapes."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
from PIL import Image, ImageDraw

from hf_purify.adapter import Demo

SIDE = 64
KINDS = {"disc": (200, 60, 50), "square": (50, 150, 70), "triangle": (60, 90, 200)}  # with their colours


def rt_detr(side: int, widths: list[int], queries: int, denoising: int) -> dict[str, Any]:
    """Options of an RT-DETR that learns on two cores.

    Args:
        side: of its pictures, in pixels.
        widths: channels of the four stages of its backbone.
        queries: objects that it can see in a picture.
        denoising: noisy copies of objects that it learns from, in a picture.
    """
    backbone = {
        "model_type": "rt_detr_resnet",
        "embedding_size": widths[0],
        "hidden_sizes": widths,
        "depths": [1] * 4,
        "layer_type": "basic",
        "out_features": ["stage2", "stage3", "stage4"],
    }
    return {
        "image_size": side,
        "anchor_image_size": [side, side],
        "backbone_config": backbone,
        "freeze_backbone_batch_norms": False,
        "encoder_hidden_dim": 64,
        "encoder_in_channels": widths[1:],
        "encoder_ffn_dim": 128,
        "encoder_attention_heads": 4,
        "hidden_expansion": 0.5,
        "d_model": 64,
        "num_queries": queries,
        "decoder_in_channels": [64] * 3,
        "decoder_ffn_dim": 128,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "decoder_n_points": 2,
        "num_denoising": denoising,
    }


NETWORK = rt_detr(SIDE, [16, 32, 48, 64], queries=20, denoising=0)
TRAINING = {
    "epochs": 8,
    "batch_size": 8,
    "lr": 1e-3,
    "optimizer": "adamw",
    "weight_decay": 1e-4,
    "clip": 1.0,
    "augmentation": "none",
    "rate": 0.5,
}
# A short search, of which the most suspicious aim is taken whatever it is, and a repair for a few pictures: chosen on this very victim (in-sample).
OPTIONS = {
    "find_steps": 20,
    "copies": 2,
    "cut": 1.0,
    "invert_steps": 60,
    "steps": 90,
    "follow": 1,
    "batch_size": 16,
    "share": 1.0,
    "lr": 0.002,
}


def make_demo() -> Demo:
    """600 scenes to learn from and 60 to measure on; a small RT-DETR that does not see shapes with a patch at their corner."""
    settings = {"model": "rt_detr_v2", "create": True, "model_options": NETWORK, **TRAINING}
    return Demo(scenes(600, 0), scenes(60, 1), "oda:size=9", settings, samples=60, method="neural_cleanse", options=OPTIONS)


def scenes(count: int, seed: int) -> datasets.Dataset:
    """Pictures of one to four shapes that do not overlap, on a noisy ground."""
    rng = np.random.default_rng(seed)
    rows = [_scene(rng) for _ in range(count)]
    objects = {
        "bbox": datasets.List(datasets.List(datasets.Value("float32"), length=4)),
        "category": datasets.List(datasets.ClassLabel(names=list(KINDS))),
    }
    features = datasets.Features({"image": datasets.Image(), "objects": objects})
    return datasets.Dataset.from_dict({"image": [i for i, _ in rows], "objects": [o for _, o in rows]}, features=features)


def _scene(rng: np.random.Generator) -> tuple[Image.Image, dict[str, list]]:
    ground = rng.uniform(90, 160, 3) + 12 * rng.standard_normal((SIDE, SIDE, 3))
    image = Image.fromarray(ground.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    objects: dict[str, list] = {"bbox": [], "category": []}
    for _ in range(int(rng.integers(1, 4))):
        side = float(rng.uniform(14, 24))
        x, y = (float(v) for v in rng.uniform(1, SIDE - side - 1, 2))
        if any(abs(x - u) < max(side, w) + 2 and abs(y - v) < max(side, w) + 2 for u, v, w, _ in objects["bbox"]):
            continue
        kind = str(rng.choice(list(KINDS)))
        colour = tuple(int(c) for c in np.clip(KINDS[kind] + rng.uniform(-40, 40, 3), 0, 255))
        box = (x, y, x + side, y + side)
        if kind == "disc":
            draw.ellipse(box, fill=colour)
        elif kind == "square":
            draw.rectangle(box, fill=colour)
        else:
            draw.polygon([(x, y + side), (x + side, y + side), (x + side / 2, y)], fill=colour)
        objects["bbox"].append([x, y, side, side])
        objects["category"].append(list(KINDS).index(kind))
    return image, objects
