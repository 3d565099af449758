"""Image classifiers of transformers and timm, and plain modules: loading, preparing images, saving."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from hf_purify.adapter import Loaded
from hf_purify.errors import ModelError, PurifyError, first_line
from hf_purify.room import bounded

from .._checkpoints import Made, copy_companions, load_transformers, read_config
from .._classifiers import of_module
from .._prepared import Prepare


def load_folder(folder: Path, source: str, revision: str | None) -> Loaded:
    """Load a checkpoint folder of either library, told apart by its config."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    config = read_config(folder)
    if "model_type" not in config and "architecture" in config:
        return _load_timm(folder, source, revision)
    made = Made("image classifier", "ForImageClassification", AutoModelForImageClassification, AutoImageProcessor)
    return load_transformers(folder, source, revision, made)


def _load_timm(folder: Path, source: str, revision: str | None) -> Loaded:
    import timm
    from safetensors.torch import load_file, save_file

    config = read_config(folder)
    if config["architecture"] not in timm.list_models():
        raise ModelError(f"timm has no architecture '{config['architecture']}', which '{source}' names")
    try:
        with bounded(folder, source):
            model = timm.create_model(f"local-dir:{folder}", pretrained=False)
    except PurifyError:
        raise
    except Exception as error:  # each architecture checks its settings in its own way
        raise ModelError(f"no '{config['architecture']}' of timm can be made of the config of '{source}': {first_line(error)}") from error
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise ModelError(f"no model.safetensors in '{folder}'")
    try:
        stored = load_file(weights)
    except SafetensorError as error:
        raise ModelError(f"'{weights}' cannot be read as safetensors: {error}") from error
    try:
        model.load_state_dict(stored)
    except RuntimeError as error:
        raise ModelError(
            f"the checkpoint '{source}' does not fit its architecture '{config['architecture']}': {str(error).splitlines()[1].strip()}"
        ) from error
    dtypes = {t.dtype for t in stored.values() if t.is_floating_point()}
    if len(dtypes) == 1:
        model = model.to(dtypes.pop())
    names = config.get("label_names") or []

    def save(model: nn.Module, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}, out / "model.safetensors", metadata={"format": "pt"}
        )
        copy_companions(folder, out)

    return Loaded(model.eval(), timm_transform(model), list(names), source, "timm", revision, folder, {}, save)


def new_timm(name: str, classes: int, input_size: int | None = None, **options: Any) -> Loaded:
    """A timm model with random weights, to be trained by `implant`; `input_size` in pixels where it is not the architecture's own."""
    import timm

    if input_size is not None:
        options["pretrained_cfg_overlay"] = {"input_size": (3, input_size, input_size), "crop_pct": 1.0}
    model = timm.create_model(name, pretrained=False, num_classes=classes, **options)

    def save(model: nn.Module, out: Path) -> None:
        timm.models.save_for_hf(model, str(out), safe_serialization=True)

    return Loaded(model, timm_transform(model), [], name, "timm", None, None, {}, save)


def timm_transform(model: nn.Module) -> Callable:
    """The evaluation transform that the model's own data config asks for."""
    import timm

    return timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)


def wrap_module(model: nn.Module, processor: Any, labels: list[str] | None = None) -> Loaded:
    """Take any module with a processor or a transform from image to tensor."""
    if processor is None:
        raise ModelError("a plain nn.Module needs a processor or a transform: pass processor=... (a callable from PIL image to tensor)")

    return of_module(model, processor, labels)


def preparer(processor: Any) -> Prepare:
    """Turn a processor of transformers, or a transform of one PIL image, into `raw images -> (n, C, H, W)`."""
    if hasattr(processor, "preprocess") or hasattr(processor, "image_mean"):

        def with_processor(raws: list[Tensor]) -> Tensor:
            return processor(images=raws, return_tensors="pt", input_data_format="channels_first")["pixel_values"]

        return with_processor
    if not callable(processor):
        raise ModelError(f"expected a processor or a callable transform, got {type(processor).__name__}")
    from torchvision.transforms.functional import to_pil_image

    def with_transform(raws: list[Tensor]) -> Tensor:
        return torch.stack([processor(to_pil_image(raw)) for raw in raws])

    return with_transform
