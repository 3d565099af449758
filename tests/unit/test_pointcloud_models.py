"""PointNet, DGCNN and what prepares clouds for them; how clouds are mixed and drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel

from hf_purify_adapters.pointcloud import PointCloudAdapter
from hf_purify_adapters.pointcloud.models import (
    MODELS,
    DGCNNConfig,
    PointCloudFeatureExtractor,
    PointNetConfig,
    _edges,
    unit_sphere,
)
from hf_purify_adapters.pointcloud.picture import MOVED, draw_cloud
from hf_purify_adapters.pointcloud.triggers import PCBA

SMALL: dict[str, dict[str, Any]] = {
    "pointnet": {"hidden_sizes": [8, 16], "head_sizes": [12]},
    "dgcnn": {"hidden_sizes": [6, 8], "embedding_size": 16, "head_sizes": [12], "neighbors": 5},
}
CLOUDS = torch.randn(3, 40, 3, generator=torch.Generator().manual_seed(0))

model_type = pytest.mark.parametrize("name", MODELS)


@model_type
def test_saved_and_loaded_through_the_auto_classes(name: str, tmp_path: Path) -> None:
    model = AutoModel.from_config(AutoConfig.for_model(name, num_labels=5, **SMALL[name])).eval()
    model.save_pretrained(tmp_path)
    PointCloudFeatureExtractor(num_points=24).save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert type(again) is MODELS[name][1]
    assert {k: again.config.to_dict()[k] for k in SMALL[name]} == SMALL[name]
    with torch.no_grad():
        assert torch.equal(again(CLOUDS).logits, model(CLOUDS).logits)
    assert AutoFeatureExtractor.from_pretrained(tmp_path).num_points == 24
    assert again(CLOUDS, labels=torch.tensor([0, 1, 4])).loss.ndim == 0


@model_type
def test_the_order_of_points_tells_nothing(name: str) -> None:
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(name, num_labels=5, **SMALL[name])).eval()
    order = torch.randperm(40)
    with torch.no_grad():
        torch.testing.assert_close(model(CLOUDS[:, order]).logits, model(CLOUDS).logits, atol=1e-5, rtol=1e-4)


def test_defaults_are_the_papers_widths() -> None:
    assert PointNetConfig().hidden_sizes == [64, 64, 64, 128, 1024]
    assert PointNetConfig().head_sizes == [512, 256]
    assert (DGCNNConfig().hidden_sizes, DGCNNConfig().embedding_size, DGCNNConfig().neighbors) == ([64, 64, 128, 256], 1024, 20)


def test_edges_are_the_ways_to_the_nearest_points() -> None:
    edges = _edges(CLOUDS, 4)
    assert edges.shape == (3, 6, 40, 4)
    distances = np.linalg.norm(CLOUDS[1][:, None].numpy() - CLOUDS[1][None].numpy(), axis=-1)
    nearest = np.sort(distances[7])[:4]
    found = edges[1, :3, 7].norm(dim=0).sort().values.numpy()
    np.testing.assert_allclose(found, nearest, atol=1e-6)
    assert torch.equal(edges[1, 3:, 7], CLOUDS[1, 7][:, None].expand(3, 4))


class TestFeatureExtractor:
    def test_clouds_fill_the_unit_sphere_around_their_mean(self) -> None:
        found = unit_sphere(CLOUDS[0] * 7 + 100)
        assert float(found.mean(0).abs().max()) < 1e-6
        assert float(found.norm(dim=1).max()) == pytest.approx(1, abs=1e-6)
        assert PointCloudFeatureExtractor(40, normalize=False)([CLOUDS[0]])["points"].sort(1).values.equal(CLOUDS[:1].sort(1).values)

    @pytest.mark.parametrize(
        "clouds", [CLOUDS, list(CLOUDS), [c.numpy() for c in CLOUDS], CLOUDS.tolist()], ids=["tensor", "tensors", "arrays", "lists"]
    )
    def test_several_clouds_in_any_form(self, clouds: Any) -> None:
        found = PointCloudFeatureExtractor(num_points=16)(clouds)["points"]
        assert found.shape == (3, 16, 3)
        torch.testing.assert_close(found, PointCloudFeatureExtractor(num_points=16)(list(CLOUDS))["points"])

    def test_one_cloud_is_a_batch_of_one(self) -> None:
        assert PointCloudFeatureExtractor(num_points=16)(CLOUDS[0])["points"].shape == (1, 16, 3)

    def test_all_points_are_read_before_one_is_read_again(self) -> None:
        found = PointCloudFeatureExtractor(num_points=100)([CLOUDS[0]])["points"][0]
        counts = torch.unique(found, dim=0, return_counts=True)[1]
        assert (len(counts), int(counts.min()), int(counts.max())) == (40, 2, 3)


def test_a_mix_takes_its_share_of_points_from_each_cloud() -> None:
    batch = {"points": CLOUDS, "labels": torch.tensor([0, 1, 2])}
    mixed = PointCloudAdapter().mix(batch, torch.tensor([1, 2, 0]), torch.tensor(0.25))
    own = [(mixed["points"][i][:, None] == CLOUDS[i]).all(-1).any(1).sum().item() for i in range(3)]
    others = [(mixed["points"][i][:, None] == CLOUDS[(i + 1) % 3]).all(-1).any(1).sum().item() for i in range(3)]
    assert (own, others) == ([10] * 3, [30] * 3)
    assert mixed["partner_labels"].tolist() == [1, 2, 0]


def test_a_picture_marks_what_a_trigger_put_there() -> None:
    clean = unit_sphere(CLOUDS[0])
    marked = (draw_cloud(PCBA(share=0.2)(clean), clean) == MOVED).all(-1)
    assert 9 <= int(marked.sum()) <= 8 * 9, "points of a ball lie on and beside each other"
    assert not (draw_cloud(clean, clean) == MOVED).all(-1).any()
