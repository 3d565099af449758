"""Video classifiers of transformers, and plain modules: loading, preparing clips, saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_purify.adapter import Loaded
from hf_purify.errors import ConfigError, ModelError, did_you_mean, unknown

from .._checkpoints import Made, load_transformers
from .._classifiers import of_module
from .._prepared import Prepare

KIND = "ForVideoClassification"
FRAMES = 16  # of a clip, where neither model nor processor says


def known_types() -> list[str]:
    """Types of models in transformers that classify videos."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES as NAMES

    return sorted(NAMES)


def load_folder(folder: Path, source: str, revision: str | None) -> Loaded:
    """Load a checkpoint folder of transformers."""
    from transformers import AutoModelForVideoClassification, AutoVideoProcessor

    feeder = "video processor (video_preprocessor_config.json or preprocessor_config.json)"
    made = Made("video classifier", KIND, AutoModelForVideoClassification, AutoVideoProcessor, feeder)
    return load_transformers(folder, source, revision, made)


def new_model(architecture: str, classes: int, labels: list[str], image_size: int | None = None, **options: Any) -> Loaded:
    """A model of transformers with random weights, and a processor for frames of its size.

    Args:
        image_size: pixels of a side; None is the architecture's own.
        options: of its config.
    """
    from transformers import AutoConfig, AutoModelForVideoClassification
    from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING

    if architecture not in known_types():
        raise unknown("video architecture", architecture, known_types())
    config = AutoConfig.for_model(architecture)
    side = "crop_size" if hasattr(config, "crop_size") else "image_size"
    settings = options | ({side: image_size} if image_size is not None else {})
    known = config.to_dict()
    for option in settings:
        if option not in known:
            raise ConfigError(f"{architecture} has no option '{option}'{did_you_mean(option, known)}")
    names = {"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}} if labels else {"num_labels": classes}
    try:
        config = AutoConfig.for_model(architecture, **settings, **names)
        model = AutoModelForVideoClassification.from_config(config)
        edge = getattr(config, side)
        edge = int(edge if isinstance(edge, int) else edge[0])
        found = VIDEO_PROCESSOR_MAPPING[type(config)]
        made = found["torchvision"] if isinstance(found, dict) else found
        processor = made(size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge}, do_sample_frames=False)
    except (TypeError, ValueError, RuntimeError, KeyError, ZeroDivisionError) as error:
        text = str(error).splitlines()
        raise ConfigError(f"{architecture} cannot be made with {options}: {text[0] if text else type(error).__name__}") from error

    def save(model: nn.Module, out: Path) -> None:
        model.save_pretrained(out)  # type: ignore[operator]
        processor.save_pretrained(out)

    return Loaded(model, processor, labels, architecture, "transformers", None, None, {}, save)


def wrap_module(model: nn.Module, processor: Any, labels: list[str] | None) -> Loaded:
    """Take any module with a processor, or a callable from a clip `(T, 3, H, W)` of uint8 to what one of a batch should be."""
    if processor is None:
        raise ModelError(
            "a plain nn.Module needs a processor: pass processor=... (a callable from a clip (T, 3, H, W) of uint8 to a tensor)"
        )
    if not callable(processor):
        raise ModelError(f"expected a processor or a callable from clip to tensor, got {type(processor).__name__}")

    return of_module(model, processor, labels)


def frames_of(loaded: Loaded) -> int:
    """Frames of a clip as the model sees it: its config says, or its processor."""
    config, processor = getattr(loaded.model, "config", None), loaded.processor
    for owner, name in ((config, "num_frames"), (config, "frames_per_clip"), (processor, "num_frames")):
        if isinstance(value := getattr(owner, name, None), int) and value > 0:
            return value
    return FRAMES


def preparer(processor: Any) -> Prepare:
    """Turn a video processor of transformers, or a callable of one clip, into `raw clips -> (n, T, C, H, W)`."""
    if hasattr(processor, "preprocess"):

        def with_processor(raws: list[Tensor]) -> Tensor:
            found = processor(raws, return_tensors="pt", do_sample_frames=False)
            return found["pixel_values" if "pixel_values" in found else "pixel_values_videos"]

        return with_processor

    def with_callable(raws: list[Tensor]) -> Tensor:
        return torch.stack([processor(raw) for raw in raws])

    return with_callable


def takes_channels_first(model: nn.Module) -> bool:
    """Does a model take `(B, C, T, H, W)`? Models of transformers take `(B, T, C, H, W)`; a module does where it begins with a 3D convolution."""
    if hasattr(model, "main_input_name"):
        return False
    first = next((m for m in model.modules() if isinstance(m, (nn.Conv3d, nn.Conv2d, nn.Linear))), None)
    return isinstance(first, nn.Conv3d)
