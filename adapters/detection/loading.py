"""Detectors of transformers: loading, preparing images, saving."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_purify.adapter import Loaded
from hf_purify.errors import ConfigError, did_you_mean, unknown

from .._checkpoints import Made, load_transformers
from .scene import Scene

KIND = "ForObjectDetection"
SIDE = 640  # pixels of a side, where a new model is not told another


def known_types() -> list[str]:
    """Types of models in transformers that detect objects and tell losses."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES as NAMES

    return sorted(n for n in NAMES if not n.startswith("pp_"))  # those read pages, and have no loss


def load_folder(folder: Path, source: str, revision: str | None) -> Loaded:
    """Load a checkpoint folder of transformers."""
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    return load_transformers(folder, source, revision, Made("object detector", KIND, AutoModelForObjectDetection, AutoImageProcessor))


def new_model(architecture: str, classes: int, labels: list[str], image_size: int | list[int] | None = None, **options: Any) -> Loaded:
    """A detector of transformers with random weights, and a processor for images of its size.

    Args:
        image_size: pixels of a side, or height and width.
        options: of its config; `backbone_config` as a mapping with its `model_type`.
    """
    from transformers import AutoConfig, AutoModelForObjectDetection, RTDetrImageProcessor
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

    if architecture not in known_types():
        raise unknown("detection architecture", architecture, known_types())
    known = AutoConfig.for_model(architecture).to_dict()
    for option in options:
        if option not in known and option != "use_timm_backbone":
            raise ConfigError(f"{architecture} has no option '{option}'{did_you_mean(option, known)}")
    names = {"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}} if labels else {"num_labels": classes}
    height, width = image_size if isinstance(image_size, (list, tuple)) else 2 * (image_size or SIDE,)
    try:
        backbone = dict(options.pop("backbone_config", None) or {})
        settings = {"backbone_config": AutoConfig.for_model(backbone.pop("model_type"), **backbone)} if backbone else {}
        if architecture == "yolos":
            settings["image_size"] = [height, width]
        config = AutoConfig.for_model(architecture, **options, **settings, **names)
        model = AutoModelForObjectDetection.from_config(config)
        revive(model)
        found = IMAGE_PROCESSOR_MAPPING.get(type(config), RTDetrImageProcessor)  # RT-DETR's is that of its kin, too
        made = found["torchvision"] if isinstance(found, dict) else found
        processor = made(size={"height": height, "width": width}, do_pad=False)
    except (TypeError, ValueError, RuntimeError, KeyError, ZeroDivisionError, ImportError) as error:
        text = str(error).strip().splitlines()
        raise ConfigError(f"{architecture} cannot be made with {options}: {text[0] if text else type(error).__name__}") from error

    def save(model: nn.Module, out: Path) -> None:
        model.save_pretrained(out)  # type: ignore[operator]
        processor.save_pretrained(out)

    return Loaded(model, processor, labels, architecture, "transformers", None, None, {}, save)


@torch.no_grad()
def revive(model: nn.Module) -> None:
    """Give convolutions and batch norms of a new model the usual random weights.

    transformers draws those of RT-DETR and D-FINE, the scales of batch norms too, from a narrow normal about zero: meant to be loaded
    over, they let all signals die out.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d) and module.weight is not None:
            nn.init.ones_(module.weight)


def size_of(processor: Any, usual: tuple[int, ...]) -> tuple[int, int]:
    """Height and width of all images as the model sees them.

    A processor that keeps the shape of an image would make batches of several sizes: then all have the one that it gives an image of
    the `usual` height and width of the data.
    """
    size = dict(getattr(processor, "size", None) or {})
    size = {k: v for k, v in size.items() if v}
    if "height" in size and "width" in size:
        return int(size["height"]), int(size["width"])
    height, width = usual
    if "shortest_edge" in size:
        scale = size["shortest_edge"] / min(height, width)
        if "longest_edge" in size:
            scale = min(scale, size["longest_edge"] / max(height, width))
        return round(height * scale), round(width * scale)
    limits = [size[k] / side for k, side in (("max_height", height), ("max_width", width)) if k in size]
    scale = min(limits, default=1.0)
    return round(height * scale), round(width * scale)


def preparer(processor: Any, size: tuple[int, int]) -> Callable[[list[Scene]], Tensor]:
    """`scenes -> (n, 3, H, W)`, all of one size."""

    def prepare(scenes: list[Scene]) -> Tensor:
        images = [scene.image for scene in scenes]
        height, width = size
        settings = {"return_tensors": "pt", "input_data_format": "channels_first", "do_pad": False}
        return processor(images=images, size={"height": height, "width": width}, **settings)["pixel_values"]

    return prepare
