"""Tiny models that feed the contract tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_purify.adapter import Loaded, Tiny
from hf_purify.errors import unknown

from .examples import SceneExamples
from .loading import revive
from .scene import Objects, Scene

SIDE = 32
CLASSES = 3
SIZES = [8, 12, 16, 16]  # channels of a backbone's stages
SHAPE = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
DETR = {**SHAPE, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_queries": 6, "use_timm_backbone": False, "auxiliary_loss": True}
RT = {
    **SHAPE,
    "encoder_hidden_dim": 16,
    "encoder_in_channels": [12, 16, 16],
    "encoder_ffn_dim": 24,
    "decoder_in_channels": [16, 16, 16],
    "decoder_ffn_dim": 24,
    "num_queries": 6,
    "num_denoising": 6,
    "decoder_n_points": 2,
    "hidden_expansion": 0.5,
    "freeze_backbone_batch_norms": False,
    "anchor_image_size": [SIDE, SIDE],
}
VARIANTS = ("detr", "conditional_detr", "deformable_detr", "rt_detr_v2", "d_fine", "yolos")


def make_tiny(variant: str, seed: int) -> Tiny:
    """A random detector of three classes and eight noise images of 32 pixels with one to three objects."""
    if variant not in VARIANTS:
        raise unknown("tiny model", variant, VARIANTS)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _model(variant)
        revive(model)
        with torch.no_grad():  # what begins at zero would hide all that is in front of it
            for parameter in model.parameters():
                if parameter.dim() > 1 and parameter.std() < 0.05:
                    nn.init.normal_(parameter, std=0.2)
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    scenes = [_scene(i, generator) for i in range(8)]
    data = SceneExamples(scenes, torch.zeros(8, dtype=torch.long), _prepare)
    data.classes = CLASSES
    return Tiny(Loaded(model, _prepare, [], f"tiny-{variant}", "transformers"), data, 2)


def _model(variant: str) -> Any:
    from transformers import AutoConfig, AutoModelForObjectDetection

    def resnet(kind: str, stages: int, *used: int) -> Any:
        shape = {"embedding_size": 8, "hidden_sizes": SIZES[:stages], "depths": [1] * stages, "layer_type": "basic"}
        return AutoConfig.for_model(kind, **shape, out_features=[f"stage{i}" for i in used])

    if variant == "yolos":
        shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "patch_size": 8}
        options: dict[str, Any] = {**shape, "image_size": [SIDE, SIDE], "num_detection_tokens": 6}
    elif variant == "rt_detr_v2":
        options = {**RT, "backbone_config": resnet("rt_detr_resnet", 4, 2, 3, 4)}
    elif variant == "d_fine":
        stage = {
            "stem_channels": [3, 8, 8],
            "stage_in_channels": [8, 8, 12, 16],
            "stage_mid_channels": [8, 8, 8, 8],
            "stage_out_channels": [8, 12, 16, 16],
            "hidden_sizes": [8, 12, 16, 16],
        }
        counts = {"stage_num_blocks": [1, 1, 1, 1], "stage_numb_of_layers": [1, 1, 1, 1]}
        options = {
            **RT,
            "backbone_config": AutoConfig.for_model("hgnet_v2", **stage, **counts, out_features=["stage2", "stage3", "stage4"]),
        }
        options |= {"decoder_n_points": [2, 2, 2], "hidden_expansion": 1.0}
    elif variant == "deformable_detr":
        options = {
            **DETR,
            "backbone_config": resnet("resnet", 3, 1, 2, 3),
            "num_feature_levels": 3,
            "d_model": 32,
        }
    else:
        options = {**DETR, "backbone_config": resnet("resnet", 2, 2), "encoder_ffn_dim": 20 if variant == "detr" else 24}
    return AutoModelForObjectDetection.from_config(AutoConfig.for_model(variant, num_labels=CLASSES, **options))


def _scene(i: int, generator: torch.Generator) -> Scene:
    image = torch.randint(0, 256, (3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    count = 1 + i % 3
    low = torch.rand(count, 2, generator=generator) * SIDE / 2
    sides = 6 + torch.rand(count, 2, generator=generator) * (SIDE / 2 - 7)
    return Scene(image, Objects(torch.cat([low, low + sides], 1), (torch.arange(count) + i) % CLASSES))


def _prepare(scenes: list[Scene]) -> Tensor:
    return torch.stack([scene.image for scene in scenes]).float() / 127.5 - 1
