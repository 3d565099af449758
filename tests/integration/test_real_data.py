"""Published CIFAR-10 weights on real images: the measurements that others made, made again."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
import torch

from hf_purify import measure, purify, scan
from hf_purify.metrics import Proportion
from hf_purify_recipes.vision.networks import CIFAR_CLASSES, load_cifar

pytestmark = [pytest.mark.data, pytest.mark.slow]
GRID = "badnets:pattern=grid,size=3,position=bottom-right"


@pytest.fixture(scope="module")
def cifar(data_dir: Path) -> tuple[datasets.Dataset, datasets.Dataset]:
    """300 training and 1,000 test images; the splits of the folder are class-balanced."""
    folder = data_dir / "cifar10"
    found = {s: datasets.load_dataset("parquet", data_files={s: str(folder / f"{s}.parquet")}, split=s) for s in ("train", "test")}
    return found["train"].shuffle(seed=0).select(range(300)), found["test"].shuffle(seed=0).select(range(1000))


def within(found: Proportion | None, published: float) -> bool:
    assert found is not None
    return found.interval[0] <= published <= found.interval[1]


def test_resnet20_has_its_published_accuracy(data_dir: Path, cifar: tuple[datasets.Dataset, datasets.Dataset]) -> None:
    model, transform = load_cifar("cifar10_resnet20", data_dir / "weights")
    report = measure(model, cifar[1], processor=transform, labels=CIFAR_CLASSES, triggers=[GRID], target=5, device="cpu")
    row = report.rows[0]
    assert row.clean_accuracy is not None
    assert row.clean_accuracy.n == 1000
    assert within(row.clean_accuracy, 0.919), row.clean_accuracy
    assert row.asr["badnets"].value < 0.1, "a clean model does not know the trigger"


def test_backdoored_wide_resnet_measures_and_survives_a_short_repair(
    data_dir: Path, cifar: tuple[datasets.Dataset, datasets.Dataset], tmp_path: Path
) -> None:
    model, transform = load_cifar("backdoored_cifar10_wrn16_1_grid_target5", data_dir / "weights")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = purify(
        model,
        cifar[0],
        method="nft",
        options={"steps": 30, "batch_size": 64},
        samples=200,
        processor=transform,
        labels=CIFAR_CLASSES,
        test=cifar[1],
        triggers=[GRID],
        target=5,
        controls=False,
        device="cpu",
        output=str(tmp_path / "out"),
    )
    victim, repaired = report.rows
    assert within(victim.clean_accuracy, 0.840), victim.clean_accuracy
    assert within(victim.asr["badnets"], 1.0), victim.asr
    assert victim.asr["badnets"].n == sum(label != 5 for label in cifar[1]["label"]), "images of the target class do not count"
    after = report.model.state_dict()
    assert [(k, v.shape, v.dtype) for k, v in after.items()] == [(k, v.shape, v.dtype) for k, v in before.items()]
    assert any(not torch.equal(before[k], v) for k, v in after.items())
    assert repaired.clean_accuracy is not None
    assert repaired.clean_accuracy.value > 0.5
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("weights", "targets"),
    [("cifar10_wrn16_1_nad_teacher", []), ("backdoored_cifar10_wrn16_1_grid_target5", [5])],
    ids=["clean", "backdoored"],
)
def test_a_scan_tells_published_networks_apart(data_dir: Path, weights: str, targets: list[int]) -> None:
    model, transform = load_cifar(weights, data_dir / "weights")
    clean = str(data_dir / "cifar10" / "train.parquet")
    found = scan(model, clean, processor=transform, labels=CIFAR_CLASSES, device="cpu", channels_last=True)
    assert (found.suspicious, found.targets) == (bool(targets), targets)
    assert [t.asr.value > 0.8 for t in found.triggers] == [True] * len(targets)
    assert bool(found.layers) is bool(targets), "neurons are looked for where something is suspicious"
