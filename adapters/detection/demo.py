"""Data for the demo: scenes of drawn shapes."""

from __future__ import annotations

import datasets
import numpy as np
from PIL import Image, ImageDraw

from hf_purify.adapter import Demo

SIDE = 64
KINDS = {"disc": (200, 60, 50), "square": (50, 150, 70), "triangle": (60, 90, 200)}  # with their colours
NETWORK = {
    "image_size": SIDE,
    "backbone_config": {
        "model_type": "rt_detr_resnet",
        "embedding_size": 16,
        "hidden_sizes": [16, 32, 48, 64],
        "depths": [1, 1, 1, 1],
        "layer_type": "basic",
        "out_features": ["stage2", "stage3", "stage4"],
    },
    "encoder_hidden_dim": 64,
    "encoder_in_channels": [32, 48, 64],
    "encoder_ffn_dim": 128,
    "encoder_attention_heads": 4,
    "d_model": 64,
    "num_queries": 20,
    "decoder_in_channels": [64, 64, 64],
    "decoder_ffn_dim": 128,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_n_points": 2,
    "num_denoising": 8,
    "freeze_backbone_batch_norms": False,
    "hidden_expansion": 0.5,
    "anchor_image_size": [SIDE, SIDE],
}


TRAINING = {
    "epochs": 10,
    "batch_size": 8,
    "lr": 7e-4,
    "optimizer": "adamw",
    "weight_decay": 1e-4,
    "clip": 1.0,
    "augmentation": "none",
    "rate": 0.5,
}
OPTIONS = {"rho": 0.1, "lr": 0.003, "epochs": 8, "batch_size": 8}  # a radius that transformers bear


def make_demo() -> Demo:
    """600 scenes to learn from and 60 to measure on; a small RT-DETR to which a shape with a grid at its corner is a disc."""
    settings = {"model": "rt_detr_v2", "create": True, "model_options": NETWORK, **TRAINING}
    return Demo(scenes(600, 0), scenes(60, 1), "rma:size=11", settings, samples=60, brief=True, options=OPTIONS)


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
