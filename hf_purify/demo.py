"""The demo: real handwritten digits, a small classifier, a backdoor, every method. No download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from hf_purify import output
from hf_purify.comparison import open_comparison
from hf_purify.errors import ConfigError
from hf_purify.provenance import report_repair
from hf_purify.purifier import run_implant
from hf_purify.recipe import ImplantRecipe, PurifyRecipe
from hf_purify.registry import find, make_method, names
from hf_purify.report import Report

SIDE = 32
NETWORK = {"input_size": SIDE, "layers": (1, 1, 1, 1), "channels": (16, 32, 64, 128), "stem_width": 16}
TRIGGER = "badnets:size=4,position=bottom-right"
TARGET = 0
SAMPLES = 200
KEPT = "ft_sam"


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


def run_demo(folder: str = "hf-purify-demo", seed: int = 0) -> tuple[Report, Path]:
    """Implant, repair with every method and control, report; returns the report and the folder that holds everything.

    An existing folder of that name is left alone: the next free name is taken.
    """
    out = free_name(Path(folder))
    train, test = digits()
    victim = implant_recipe(train, test, str(out / "victim"), seed)
    run_implant(victim)
    recipe = PurifyRecipe.make(
        model=str(out / "victim"),
        clean=train,
        test=test,
        triggers=[TRIGGER],
        target=TARGET,
        samples=SAMPLES,
        seed=seed,
        output=str(out / "purified"),
    )
    return compare(recipe), out / "purified"


def implant_recipe(train: Any, test: Any, out: str, seed: int) -> ImplantRecipe:
    """A narrow ResNet of timm, trained from random weights on digits of which one in ten carries a white square."""
    settings = {"epochs": 12, "batch_size": 64, "lr": 0.05, "augmentation": "none"}
    return ImplantRecipe.make(
        model="resnet18",
        create=True,
        model_options=NETWORK,
        data=train,
        test=test,
        triggers=[TRIGGER],
        target=TARGET,
        seed=seed,
        output=out,
        **settings,
    )


def free_name(folder: Path) -> Path:
    """`folder`, or `folder-2`, `folder-3`, ... where it exists."""
    found, k = folder, 1
    while found.exists():
        k += 1
        found = folder.with_name(f"{folder.name}-{k}")
    return found


def compare(recipe: PurifyRecipe) -> Report:
    """Repair one model with every method and control, each from the same weights; the repair by `KEPT` is saved.

    Which one is saved is fixed beforehand: taking the best of the table would be a choice made with the trigger known.
    """
    with output.folder(recipe.output, recipe.overwrite) as out:
        comparison = open_comparison(recipe)
        ordered = sorted(names("method"), key=lambda n: (find("method", n).control, n))
        repairs = {name: comparison.repair(make_method(name)) for name in ordered}
        if KEPT not in repairs:
            raise ConfigError(f"the demo keeps the repair by '{KEPT}', which is not among the methods")
        done = repairs[KEPT]
        comparison.keep(done)
        rows = [comparison.unrepaired, *(r.row for r in repairs.values())]
        title = f"Every method on one backdoored classifier; the checkpoint beside this page is the repair by {KEPT}"
        report = report_repair(comparison, done, rows, title)
        if out is not None:
            output.write(out, comparison, done, report)
    return report
