"""What journeys share: handwritten digits, and a small classifier of them with a backdoor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from shrunk import RESNET

from hf_purify import implant
from hf_purify_adapters.vision.demo import TRIGGER, digits

Splits = tuple[datasets.Dataset, datasets.Dataset]


@pytest.fixture(scope="session")
def data() -> Splits:
    train, test = digits()
    return train, test.select(range(300))


@pytest.fixture(scope="session")
def stored(data: Splits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits as Parquet files, and a few of them as an image folder."""
    folder = tmp_path_factory.mktemp("digits")
    (folder / "parquet").mkdir()
    data[0].to_parquet(folder / "parquet" / "train.parquet")
    data[1].to_parquet(folder / "parquet" / "test.parquet")
    return folder


@pytest.fixture(scope="session")
def victim(data: Splits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A timm classifier with a backdoor."""
    out = tmp_path_factory.mktemp("timm") / "victim"
    settings: dict[str, Any] = {"epochs": 7, "batch_size": 32, "rate": 0.2, "lr": 0.05, "augmentation": "none"}
    report = implant(
        "resnet18", data[0], TRIGGER, create=True, model_options=RESNET, test=data[1], output=str(out), device="cpu", **settings
    )
    assert report.rows[0].asr["badnets"].value >= 0.9
    return out
