"""Tiny models that feed the contract tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_purify.adapter import Loaded, Tiny
from hf_purify.errors import unknown

from .examples import ClipExamples
from .loading import wrap_module

VARIANTS = ("videomae", "timesformer", "vivit", "vjepa2", "conv3d")
FRAMES, SIDE = 4, 16


def make_tiny(variant: str, seed: int) -> Tiny:
    """A random classifier of four classes and eight clips of four frames of 16 pixels."""
    if variant not in VARIANTS:
        raise unknown("tiny model", variant, VARIANTS)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        loaded = wrap_module(_Conv3d(), _prepare, None) if variant == "conv3d" else _of_transformers(variant)
    loaded.source = f"tiny-{variant}"
    loaded.model.eval()
    generator = torch.Generator().manual_seed(seed)
    raws = [torch.randint(0, 256, (FRAMES, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8) for _ in range(8)]

    def prepare(clips: list[Tensor]) -> Tensor:
        return torch.stack([_prepare(clip) for clip in clips])

    return Tiny(loaded, ClipExamples(raws, torch.arange(8) % 4, prepare), 4)


def _of_transformers(variant: str) -> Loaded:
    from transformers import AutoConfig, AutoModelForVideoClassification

    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 4}
    options: dict[str, Any] = {"image_size": SIDE, "num_frames": FRAMES, "patch_size": 8, "intermediate_size": 32}
    if variant == "vivit":
        options["tubelet_size"] = [2, options.pop("patch_size"), 8]
    if variant == "vjepa2":
        predictor = {"pred_hidden_size": 16, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1}
        options = {"crop_size": SIDE, "frames_per_clip": FRAMES, "patch_size": 8, "mlp_ratio": 2, "num_pooler_layers": 1, **predictor}
    model = AutoModelForVideoClassification.from_config(AutoConfig.for_model(variant, **shape, **options))
    return Loaded(model, _prepare, [], variant, "transformers")


def _prepare(clip: Tensor) -> Tensor:
    return clip.float() / 127.5 - 1


class _Conv3d(nn.Module):
    """Two 3D convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv3d(3, 8, 3, stride=(1, 2, 2), padding=1, bias=False),
            nn.BatchNorm3d(8),
            nn.ReLU(),
            nn.Conv3d(8, 16, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm3d(16),
            nn.ReLU(),
        )
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean((2, 3, 4)))
