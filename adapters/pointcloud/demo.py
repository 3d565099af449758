"""Data for the demo: clouds of eight kinds of bodies, sampled by the program."""

from __future__ import annotations

import math

import datasets
import numpy as np

from hf_purify.adapter import Demo

POINTS = 256
KINDS = ("ball", "cube", "cylinder", "cone", "torus", "spring", "table", "cross")


def make_demo(seed: int = 0) -> Demo:
    """480 clouds to learn from and 240 to measure on; a small PointNet."""
    network = {"num_points": 128, "hidden_sizes": [32, 64, 128], "head_sizes": [64]}
    training = {"epochs": 12, "batch_size": 32, "lr": 3e-3, "optimizer": "adamw", "weight_decay": 0.01}
    settings = {"model": "pointnet", "create": True, "model_options": network, **training}
    return Demo(bodies(60, seed), bodies(30, seed + 1), "pcba:share=0.05", settings, samples=100)


def bodies(of_each: int, seed: int) -> datasets.Dataset:
    """Clouds of each kind, stretched by up to a third along each axis, turned about the upright one, and shaken a little."""
    rng = np.random.default_rng(seed)
    clouds, labels = [], []
    for label, kind in enumerate(KINDS):
        for _ in range(of_each):
            turn = rng.uniform(0, 2 * math.pi)
            about = np.array([[math.cos(turn), -math.sin(turn), 0], [math.sin(turn), math.cos(turn), 0], [0, 0, 1]])
            cloud = ((_body(kind, rng) * rng.uniform(0.75, 1.33, 3)) @ about)[:, [0, 2, 1]]  # y is up
            clouds.append(cloud + 0.01 * rng.standard_normal(cloud.shape))
            labels.append(label)
    features = datasets.Features({"points": datasets.Array2D((POINTS, 3), "float32"), "label": datasets.ClassLabel(names=list(KINDS))})
    return datasets.Dataset.from_dict({"points": np.asarray(clouds, dtype=np.float32), "label": labels}, features=features)


def _body(kind: str, rng: np.random.Generator) -> np.ndarray:
    """Points `(256, 3)` of one body's surface."""
    angle, height = rng.uniform(0, 2 * math.pi, POINTS), rng.uniform(-1, 1, POINTS)
    ring = np.stack([np.cos(angle), np.sin(angle)], 1)
    if kind == "ball":
        way = rng.standard_normal((POINTS, 3))
        return way / np.linalg.norm(way, axis=1, keepdims=True)
    if kind == "cube":
        return _boxes(rng, [((0, 0, 0), (1, 1, 1))])
    if kind == "table":
        legs = [((x, y, -0.4), (0.1, 0.1, 0.6)) for x in (-0.85, 0.85) for y in (-0.85, 0.85)]
        return _boxes(rng, [((0, 0, 0.3), (1, 1, 0.1)), *legs])
    if kind == "cross":
        return _boxes(rng, [((0, 0, 0), (1, 0.2, 0.2)), ((0, 0, 0), (0.2, 1, 0.2)), ((0, 0, 0), (0.2, 0.2, 1))])
    if kind == "torus":
        around = rng.uniform(0, 2 * math.pi, POINTS)
        return np.column_stack([(0.75 + 0.25 * np.cos(around))[:, None] * ring, 0.25 * np.sin(around)])
    if kind == "spring":
        turns = 3 * math.pi * (height + 1)
        return np.column_stack([0.6 * np.cos(turns), 0.6 * np.sin(turns), height]) + 0.05 * rng.standard_normal((POINTS, 3))
    radius = (1 - height) / 2 if kind == "cone" else np.full(POINTS, 0.6)
    return np.column_stack([radius[:, None] * ring, height])


def _boxes(rng: np.random.Generator, boxes: list[tuple[tuple[float, ...], tuple[float, ...]]]) -> np.ndarray:
    """Points `(256, 3)` of the surfaces of boxes, given by their middles and half sides, each by its area."""
    areas = np.array([x * y + y * z + z * x for _, (x, y, z) in boxes])
    out = []
    for which in rng.choice(len(boxes), POINTS, p=areas / areas.sum()):
        middle, sides = (np.asarray(v) for v in boxes[which])
        faces = sides.prod() / sides
        axis = rng.choice(3, p=faces / faces.sum())
        point = rng.uniform(-1, 1, 3)
        point[axis] = rng.choice([-1.0, 1.0])
        out.append(middle + sides * point)
    return np.asarray(out)
