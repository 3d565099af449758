"""Image classifiers as their configs describe them, and images of their size: for estimates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hf_purify.adapter import Batch, Loaded, Outline
from hf_purify.errors import ConfigError, ModelError, did_you_mean, first_line

from .._checkpoints import blank_model, stored_dtype

SIDE = 224  # pixels, where a config says nothing


def make_outline(config: Mapping[str, Any], length: int | None) -> Outline:
    """The model of transformers or timm, and images of the size that its config names."""
    if length is not None:
        raise ConfigError(
            "length is for texts, and this is an image classifier, whose config says how large its images are: leave it (--length) out"
        )
    if "model_type" not in config and "architecture" in config:
        loaded, (channels, height, width) = _timm(config)
    else:
        from transformers import AutoModelForImageClassification

        name = str(config.get("_name_or_path") or config.get("model_type"))
        model: Any = blank_model(config, name, AutoModelForImageClassification, "image classifier")
        loaded = Loaded(model, None, [], name, "transformers")
        side = getattr(model.config, "image_size", None) or SIDE
        height, width = side if isinstance(side, (list, tuple)) else (side, side)
        channels = getattr(model.config, "num_channels", 3)

    def batch(n: int) -> Batch:
        weight = next(p for p in loaded.model.parameters() if p.is_floating_point())
        images = torch.rand(n, channels, height, width, dtype=weight.dtype, device=weight.device)
        return {"pixel_values": images, "labels": torch.zeros(n, dtype=torch.long)}

    return Outline(loaded, batch, f"{height} x {width} pixels", stored_dtype(loaded.model))


def _timm(config: Mapping[str, Any]) -> tuple[Loaded, tuple[int, int, int]]:
    import timm

    name = str(config["architecture"])
    if name not in timm.list_models():
        raise ModelError(f"timm has no architecture '{name}', which the config names{did_you_mean(name, timm.list_models())}")
    given = {**(config.get("model_args") or {}), **({"num_classes": config["num_classes"]} if "num_classes" in config else {})}
    try:
        model = timm.create_model(name, pretrained=False, pretrained_cfg=dict(config.get("pretrained_cfg") or {}), **given)
    except Exception as error:  # each architecture checks its settings in its own way
        raise ModelError(f"timm can make no '{name}' of this config: {first_line(error)}") from error
    return Loaded(model.eval(), None, [], name, "timm"), timm.data.resolve_model_data_config(model)["input_size"]
