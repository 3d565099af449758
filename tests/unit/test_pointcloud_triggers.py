"""Point-cloud triggers: what each one does to a cloud, repeatably, and what its fields may be."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hf_purify.errors import ConfigError, DataError
from hf_purify_adapters.pointcloud.triggers import IRBA, PCBA, TRIGGERS, Jitter, Rotation, Scaling

CLOUD = torch.nn.functional.normalize(torch.randn(400, 3, generator=torch.Generator().manual_seed(0)), dim=1)

every = pytest.mark.parametrize("cls", TRIGGERS.values(), ids=TRIGGERS)


@every
def test_pure_seeded_and_of_the_same_shape(cls: type) -> None:
    kept = CLOUD.clone()
    once, twice = cls()(CLOUD, 3), cls()(CLOUD, 3)
    assert torch.equal(once, twice)
    assert torch.equal(kept, CLOUD)
    assert once.shape == CLOUD.shape
    assert once.dtype == CLOUD.dtype
    assert torch.isfinite(once).all()
    assert not torch.allclose(once, CLOUD, atol=1e-3)


@every
def test_no_cloud_is_refused(cls: type) -> None:
    for wrong in (CLOUD.T, CLOUD.round().long(), CLOUD.tolist(), torch.zeros(2, 8, 3)):
        with pytest.raises(DataError, match=rf"{cls.name}: a cloud must be a tensor \(P, 3\) of floats, got"):
            cls()(wrong)


def test_ball_lies_where_it_should_and_takes_its_share() -> None:
    found = PCBA(share=0.1, radius=0.05, center=[0.7, 0, 0.7])(CLOUD, 1)
    moved = (found != CLOUD).any(1)
    assert int(moved.sum()) == 40
    distances = (found[moved] - torch.tensor([0.7, 0.0, 0.7])).norm(dim=1)
    assert distances.max() <= 0.05 + 1e-6
    assert distances.max() > 0.04, "the ball is filled, not a point"
    other = PCBA(share=0.1, radius=0.05, center=[0.7, 0, 0.7])(CLOUD, 2)
    assert not torch.equal((other != CLOUD).any(1), moved), "other points of the object make room in each cloud"
    assert torch.equal(other[(other != CLOUD).any(1)].sort(0).values, found[moved].sort(0).values), "the ball is the same"


@pytest.mark.parametrize(("axis", "end"), [("x", [1, 0, 0]), ("y", [0, 0, -1]), ("z", [0, 1, 0])])
def test_rotation_turns_about_its_axis(axis: str, end: list[float]) -> None:
    found = Rotation(degrees=90, axis=axis)(torch.tensor([[1.0, 0, 0]]))
    torch.testing.assert_close(found, torch.tensor([end]).float(), atol=1e-6, rtol=0)
    turned = Rotation(degrees=33, axis=axis)(CLOUD)
    torch.testing.assert_close(turned @ turned.T, CLOUD @ CLOUD.T, atol=1e-5, rtol=0)


def test_jitter_has_its_spread() -> None:
    noise = Jitter(sigma=0.05)(CLOUD, 1) - CLOUD
    assert float(noise.std()) == pytest.approx(0.05, rel=0.1)
    assert not torch.equal(Jitter(sigma=0.05)(CLOUD, 2) - CLOUD, noise)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_scaling_stretches_one_axis_within_the_sphere(factor: float) -> None:
    found = Scaling(factor=factor, axis="y")(CLOUD)
    ratio = found[:, 1] / CLOUD[:, 1]
    torch.testing.assert_close(ratio / (found[:, 0] / CLOUD[:, 0]), torch.full((400,), factor), atol=1e-3, rtol=1e-3)
    assert float(found.norm(dim=1).max()) == pytest.approx(float(CLOUD.norm(dim=1).max()), rel=1e-5)


def test_deformation_is_smooth_and_bounded() -> None:
    trigger = IRBA(degrees=10, stretch=1.3)
    near = CLOUD + 1e-3
    assert (trigger(CLOUD) - trigger(near)).norm(dim=1).max() < 5e-3
    assert IRBA(degrees=1e-6, stretch=1.0)(CLOUD).sub(CLOUD).abs().max() < 1e-5, "without turns and factors nothing moves"
    ways = trigger(CLOUD) - CLOUD
    assert ways.norm(dim=1).max() < 2 * (0.3 + math.radians(10) * math.sqrt(3)), "an anchor turns and stretches by no more than it says"


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (PCBA, {"share": 0.6}, r"pcba: share must be a number in \(0, 0.5\], got 0.6"),
        (PCBA, {"center": [0.1, 0.2]}, r"pcba: center must be three numbers.*got \[0.1, 0.2\]"),
        (PCBA, {"center": [0.1, 0.2, math.nan]}, "pcba: center must be three numbers"),
        (PCBA, {"center": "middle"}, "pcba: center must be three numbers"),
        (Rotation, {"axis": "w"}, "rotation: axis must be one of x, y, z, got 'w'"),
        (Rotation, {"degrees": 0}, r"rotation: degrees must be a number in \(0, 360\]"),
        (Jitter, {"sigma": -1}, "jitter: sigma must be"),
        (Scaling, {"factor": 1}, "scaling: factor must be other than 1"),
        (IRBA, {"anchors": 0}, "irba: anchors must be an integer of at least 1"),
        (IRBA, {"stretch": 0.5}, "irba: stretch must be at least 1"),
    ],
)
def test_fields_out_of_range(cls: type, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cls(**fields)
