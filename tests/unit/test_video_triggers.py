"""Video triggers: what each one does to a clip, repeatably, and what its fields may be."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_purify.errors import ConfigError, DataError
from hf_purify_adapters.video.triggers import TRIGGERS, BadNets, Blended, Flicker, MovingPatch
from hf_purify_adapters.vision.triggers import BadNets as PictureBadNets
from hf_purify_adapters.vision.triggers import Blended as PictureBlended

CLIP = torch.randint(30, 220, (8, 3, 32, 40), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

every = pytest.mark.parametrize("cls", TRIGGERS.values(), ids=TRIGGERS)


@every
def test_pure_seeded_and_of_the_same_shape(cls: type) -> None:
    kept = CLIP.clone()
    once, twice = cls()(CLIP, 3), cls()(CLIP, 3)
    assert torch.equal(once, twice)
    assert torch.equal(kept, CLIP)
    assert once.shape == CLIP.shape
    assert once.dtype == torch.uint8
    assert not torch.equal(once, CLIP)


@every
def test_no_clip_is_refused(cls: type) -> None:
    for wrong in (CLIP.float(), CLIP[0], CLIP.permute(0, 2, 3, 1), CLIP.tolist()):
        with pytest.raises(DataError, match=rf"{cls.name}: a clip must be a uint8 tensor \(T, 3, H, W\), got"):
            cls()(wrong)


def test_patch_is_that_of_images_in_every_frame() -> None:
    found = BadNets(size=5, pattern="grid", position="top-left")(CLIP)
    picture = PictureBadNets(size=5, pattern="grid", position="top-left")
    assert torch.equal(found, torch.stack([picture(frame) for frame in CLIP]))


def test_patch_in_some_frames_is_in_so_many() -> None:
    trigger = BadNets(size=4, frames=3)
    changed = [(trigger(CLIP, seed) != CLIP).flatten(1).any(1) for seed in range(6)]
    assert {int(c.sum()) for c in changed} == {3}
    assert len({tuple(c.tolist()) for c in changed}) > 1, "other frames in each clip"


def test_blend_is_that_of_images_in_every_frame() -> None:
    picture = PictureBlended(alpha=0.4, pattern_seed=2)
    assert torch.equal(Blended(alpha=0.4, pattern_seed=2)(CLIP), torch.stack([picture(frame) for frame in CLIP]))


def test_square_moves_from_left_to_right() -> None:
    found = MovingPatch(size=4, margin=1)(CLIP)
    places = []
    for before, after in zip(CLIP, found, strict=True):
        rows, columns = (after != before).any(0).nonzero(as_tuple=True)
        assert (int(rows.min()), int(rows.max())) == (27, 30)
        assert int(columns.max() - columns.min()) == 3
        places.append(int(columns.min()))
        assert (after[:, 27:31, places[-1] : places[-1] + 4] == 255).all()
    assert places == sorted(places)
    assert (places[0], places[-1]) == (0, 36)


def test_light_goes_up_and_down() -> None:
    change = Flicker(delta=20, period=4)(CLIP).int() - CLIP.int()
    assert change.flatten(1).unique(dim=1).shape[1] == 1, "a frame changes alike everywhere"
    assert change[:, 0, 0, 0].tolist() == [20, 20, -20, -20] * 2


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (BadNets, {"frames": 0}, "badnets: frames must be an integer of at least 1 or None, got 0"),
        (BadNets, {"position": "middle"}, "badnets: position must be one of"),
        (Blended, {"alpha": 2}, r"blended: alpha must be a number in \(0, 1\]"),
        (MovingPatch, {"size": 0}, "moving_patch: size must be an integer of at least 1"),
        (Flicker, {"period": 1}, "flicker: period must be an integer of at least 2"),
        (Flicker, {"delta": 300}, "flicker: delta must be"),
    ],
)
def test_fields_out_of_range(cls: type, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cls(**fields)


def test_what_does_not_fit_the_clip_is_said() -> None:
    with pytest.raises(ConfigError, match="9 frames do not fit a clip of 8"):
        BadNets(frames=9)(CLIP)
    with pytest.raises(ConfigError, match="a square of 50 pixels with margin 0 does not fit frames of 32x40"):
        MovingPatch(size=50)(CLIP)
