"""Image classifiers of transformers and timm, and plain modules: loading, preparing images, saving."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from hf_purify.adapter import Loaded
from hf_purify.errors import ModelError

from .examples import Prepare

WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".index.json")


def read_config(folder: Path) -> dict[str, Any]:
    """The checkpoint's `config.json`.

    Raises:
        ModelError: it is missing or no JSON object.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(f"no config.json in '{folder}'; expected a transformers or timm checkpoint")
    try:
        config = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ModelError(f"'{file}' is no valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"'{file}' must hold a JSON object, got {type(config).__name__}")
    return config


def load_folder(folder: Path, source: str, revision: str | None) -> Loaded:
    """Load a checkpoint folder of either library, told apart by its config."""
    config = read_config(folder)
    if "model_type" not in config and "architecture" in config:
        return _load_timm(folder, source, revision)
    return _load_transformers(folder, config, source, revision)


def _load_transformers(folder: Path, config: dict[str, Any], source: str, revision: str | None) -> Loaded:
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

    architectures = config.get("architectures") or []
    if architectures and not any("ImageClassification" in a for a in architectures):
        raise ModelError(
            f"'{source}' is no image classifier: its config names {', '.join(architectures)}; expected an architecture ForImageClassification"
        )
    try:
        parsed = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        raise ModelError(f"'{source}' cannot be read as a transformers model: {str(error).splitlines()[0]}") from error
    if type(parsed) not in AutoModelForImageClassification._model_mapping:
        raise ModelError(
            f"'{source}' is no image classifier: models of type '{parsed.model_type}' have no image classification head in transformers"
        )
    if getattr(parsed, "quantization_config", None):
        raise ModelError(f"the weights of '{source}' are quantized; a repair needs floating-point weights: load the unquantized checkpoint")
    options = {"use_safetensors": True, "trust_remote_code": False, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, info = AutoModelForImageClassification.from_pretrained(folder, config=parsed, **options)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"the weights of '{source}' cannot be read: {str(error).splitlines()[0]}") from error
    check_loaded(info.get("missing_keys"), info.get("unexpected_keys"), info.get("mismatched_keys"), source)
    try:
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"'{source}' has no image processor (preprocessor_config.json): {str(error).splitlines()[0]}") from error
    labels = [parsed.id2label[i] for i in sorted(parsed.id2label)] if parsed.id2label else []

    def save(model: nn.Module, out: Path) -> None:
        model.save_pretrained(out)  # type: ignore[operator]
        copy_companions(folder, out)

    return Loaded(model.eval(), processor, labels, source, "transformers", revision, folder, transformers_keys(model), save)


def check_loaded(missing: Any, unexpected: Any, mismatched: Any, source: str) -> None:
    """Refuse a checkpoint that would leave parts of the model at random values."""
    if missing or mismatched:
        first = [str(k) for k in (missing or mismatched)][:3]
        what = "lacks" if missing else "has other shapes for"
        raise ModelError(
            f"the checkpoint '{source}' {what} {len(missing or mismatched)} of the model's tensors, such as {', '.join(first)}; it would run on random weights"
        )


def transformers_keys(model: nn.Module) -> dict[str, str]:
    """Parameter name -> key under which `save_pretrained` writes it, where the two differ.

    The mapping is read off a renaming of index tensors; where several parameters are fused on saving there is none.
    """
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers < 5.? writes module names
        return {}
    names = list(model.state_dict())
    marks = {n: torch.full((1,), i) for i, n in enumerate(names)}
    try:
        saved = revert_weight_conversion(model, dict(marks))  # type: ignore[arg-type]
        return {names[int(mark)]: key for key, mark in saved.items() if mark.numel() == 1 and names[int(mark)] != key}
    except (RuntimeError, ValueError, IndexError):
        return {}


def _load_timm(folder: Path, source: str, revision: str | None) -> Loaded:
    import timm
    from safetensors.torch import load_file, save_file

    config = read_config(folder)
    if config["architecture"] not in timm.list_models():
        raise ModelError(f"timm has no architecture '{config['architecture']}', which '{source}' names")
    model = timm.create_model(f"local-dir:{folder}", pretrained=False)
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

    def save(model: nn.Module, out: Path) -> None:
        from safetensors.torch import save_model

        out.mkdir(parents=True, exist_ok=True)
        save_model(model, str(out / "model.safetensors"))

    return Loaded(model, processor, list(labels or []), type(model).__name__, "module", None, None, {}, save)


def copy_companions(source: Path, out: Path) -> None:
    """Copy what lies beside the weights (processor, tokenizer, label files), except what the output has already."""
    for file in source.iterdir():
        if (
            file.is_file()
            and not file.name.endswith(WEIGHT_FILES)
            and file.name.lower() not in ("readme.md", ".gitattributes")
            and not (out / file.name).exists()
        ):
            shutil.copyfile(file, out / file.name)


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
