"""Real boxes, words on lips and shapes, read as a repair reads them."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from films import film

from hf_purify.registry import find
from hf_purify_adapters.detection.demo import rt_detr
from hf_purify_adapters.pointcloud.files import open_clouds
from hf_purify_adapters.video.clips import read_clip

pytestmark = [pytest.mark.data, pytest.mark.slow]


@pytest.mark.parametrize(
    ("name", "images", "classes"), [("bccd", 60, 3), ("playing_cards", 47, 6), ("hand_gestures", 86, 10), ("coco128", 100, 80)]
)
def test_every_box_of_a_set_is_read_and_learned_from(data_dir: Path, tmp_path: Path, name: str, images: int, classes: int) -> None:
    adapter = find("adapter", "detection")()
    file = data_dir / name / "test.parquet"
    stored = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path))
    labels = adapter.class_names(str(file), None, {})
    assert len(labels) == classes
    torch.manual_seed(0)
    loaded = adapter.create("rt_detr_v2", classes, labels=labels, **rt_detr(64, [8, 16, 24, 32], queries=30, denoising=0))
    data = adapter.examples(str(file), loaded, balanced=False)
    assert len(data) == images == len(stored)
    for i in range(images):
        scene, row = data.raw(i), stored[i]
        height, width = scene.image.shape[1:]
        assert scene.objects.categories.tolist() == row["objects"]["category"]
        given = torch.tensor(row["objects"]["bbox"]).reshape(-1, 4)
        corners = torch.cat([given[:, :2], given[:, :2] + given[:, 2:]], 1)
        limits = torch.tensor([width, height, width, height])
        torch.testing.assert_close(scene.objects.boxes, corners.clamp(min=0).minimum(limits.float()))
    losses = adapter.loss(loaded.model, data.batch(torch.arange(4)))
    assert losses.shape == (4,)
    assert torch.isfinite(losses).all()


def test_words_on_lips_as_films(data_dir: Path, tmp_path: Path) -> None:
    """Each frame of the data comes back from a film made of it, but for what compression changes; folders name the words."""
    words = datasets.Dataset.from_parquet(str(data_dir / "miracl_vc1_words" / "test.parquet"), cache_dir=str(tmp_path / "cache")).select(
        range(20)
    )
    names = words.features["label"].names
    for i, row in enumerate(words):
        frames = [np.asarray(frame.convert("RGB")) for frame in row["frames"]]
        made = film(tmp_path / "films" / names[row["label"]] / f"{i}.mp4", frames)
        seen = read_clip(str(made), len(frames)).frames
        original = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
        assert seen.shape == original.shape == (16, 3, 64, 64)
        assert float((seen.float() - original.float()).abs().mean()) < 3
    adapter = find("adapter", "video")()
    assert set(adapter.class_names(str(tmp_path / "films"), None, {})) == {names[label] for label in words["label"]}


def test_shapes_are_read_and_made_ready(data_dir: Path) -> None:
    adapter = find("adapter", "pointcloud")()
    file = str(data_dir / "shapes3d" / "test.npz")
    names = open_clouds(file).features["label"].names
    assert len(names) == 69
    loaded = adapter.create("pointnet", len(names), labels=names, num_points=256, hidden_sizes=[16, 16, 32], head_sizes=[16])
    data = adapter.examples(file, loaded)
    batch = data.batch(torch.arange(len(data)))
    points = batch[adapter.key]
    assert points.shape == (len(data), 256, 3)
    assert torch.isfinite(points).all()
    assert float(points.norm(dim=-1).max()) <= 1 + 1e-5
    assert adapter.logits(loaded.model.eval(), data.batch(torch.arange(8))).shape == (8, 69)
