"""Video models: how many frames they see, in which order of axes, and new ones with their processors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_purify.adapter import Loaded
from hf_purify.errors import ConfigError, UnknownName
from hf_purify_adapters.video import VideoAdapter
from hf_purify_adapters.video.loading import FRAMES, frames_of, known_types, takes_channels_first

SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
SHAPES: dict[str, dict[str, Any]] = {
    "videomae": {**SHAPE, "patch_size": 8, "num_frames": 6},
    "timesformer": {**SHAPE, "patch_size": 8, "num_frames": 6},
    "vivit": {**SHAPE, "tubelet_size": [2, 8, 8], "num_frames": 6},
    "vjepa2": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "patch_size": 8,
        "frames_per_clip": 6,
        "pred_hidden_size": 16,
        "pred_num_attention_heads": 2,
        "pred_num_hidden_layers": 1,
    },
}


@pytest.mark.parametrize("name", SHAPES)
def test_new_models_have_a_processor_of_their_size(name: str, tmp_path: Path) -> None:
    adapter = VideoAdapter()
    torch.manual_seed(0)
    loaded = adapter.create(name, 3, image_size=16, labels=["a", "b", "c"], **SHAPES[name])
    assert frames_of(loaded) == 6
    clip = torch.randint(0, 256, (6, 3, 20, 24), dtype=torch.uint8)
    inputs = adapter.prepare([clip, clip], loaded)
    assert inputs.shape == (2, 6, 3, 16, 16)
    assert loaded.saver is not None
    loaded.saver(loaded.model, tmp_path)
    again = adapter.load(tmp_path)
    assert (again.labels, frames_of(again)) == (["a", "b", "c"], 6)
    batch = {"pixel_values": inputs}
    with torch.no_grad():
        assert torch.equal(adapter.logits(again.model, batch), adapter.logits(loaded.model.eval(), batch))
    assert torch.equal(adapter.prepare([clip, clip], again), inputs)


def test_every_shape_is_of_a_known_type() -> None:
    assert set(SHAPES) <= set(known_types())
    with pytest.raises(UnknownName, match="did you mean 'videomae'"):
        VideoAdapter().create("videoma", 3)
    with pytest.raises(ConfigError, match="videomae has no option 'patchsize'; did you mean 'patch_size'"):
        VideoAdapter().create("videomae", 3, patchsize=8)


def test_frames_of_modules_come_from_the_processor_or_are_sixteen() -> None:
    class Processor:
        num_frames = 5

    assert frames_of(Loaded(nn.Linear(1, 1), Processor())) == 5
    assert frames_of(Loaded(nn.Linear(1, 1), lambda clip: clip)) == FRAMES == 16


@pytest.mark.parametrize(
    ("first", "expected"), [(nn.Conv3d(3, 4, 1), True), (nn.Conv2d(3, 4, 1), False), (nn.Linear(3, 4), False)], ids=["3d", "2d", "linear"]
)
def test_modules_that_begin_with_a_3d_convolution_get_channels_first(first: nn.Module, expected: bool) -> None:
    assert takes_channels_first(nn.Sequential(first, nn.Linear(4, 2))) is expected
