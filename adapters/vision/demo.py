"""Data for the demo: real handwritten digits."""

from __future__ import annotations

import datasets
import numpy as np
from PIL import Image

from hf_purify.adapter import Demo

SIDE = 32
NETWORK = {"input_size": SIDE, "layers": (1, 1, 1, 1), "channels": (16, 32, 64, 128), "stem_width": 16}
TRIGGER = "badnets:size=4,position=bottom-right"


def make_demo() -> Demo:
    """A narrow ResNet of timm, trained from random weights on digits of which one in ten carries a white square."""
    training = {"epochs": 12, "batch_size": 64, "lr": 0.05, "augmentation": "none"}
    settings = {"model": "resnet18", "create": True, "model_options": NETWORK, **training}
    return Demo(*digits(), TRIGGER, settings)


def digits() -> tuple[datasets.Dataset, datasets.Dataset]:
    """The 1,797 handwritten digits of scikit-learn as colour images of 32 pixels: a training and a test set."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    images = [Image.fromarray(g).resize((SIDE, SIDE), Image.Resampling.BILINEAR).convert("RGB") for g in grey]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(i) for i in range(10)])})
    whole = datasets.Dataset.from_dict({"image": images, "label": bunch.target.tolist()}, features=features)
    parts = whole.train_test_split(test_size=797, seed=0, stratify_by_column="label")
    return parts["train"], parts["test"]
