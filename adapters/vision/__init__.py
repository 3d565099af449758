"""Image classification: any classifier of transformers or timm, and plain modules."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from hf_purify.adapter import Batch, Demo, Examples, Loaded, Outline, Tiny
from hf_purify.calibration import Calibration
from hf_purify.errors import ConfigError, did_you_mean
from hf_purify.stand_in import StandIn
from hf_purify.tables import Selection, class_names, open_data

from .._classifiers import Classifier
from .._pixels import AUGMENTATIONS, moved, restored
from .demo import make_demo
from .examples import ImageExamples, read_images
from .loading import load_folder, new_timm, preparer, wrap_module
from .outline import make_outline
from .stand_in import Patches, Spectrum, Warp, Waves
from .triggers import TRIGGERS


class VisionAdapter(Classifier):
    key: ClassVar[str] = "pixel_values"
    name: ClassVar[str] = "vision"
    task: ClassVar[str] = "image-classification"
    variants: ClassVar[tuple[str, ...]] = ("resnet", "convnext", "vit", "swin")
    columns: ClassVar[tuple[str, ...]] = ("image", "label")
    loose: ClassVar[str | None] = "imagefolder"
    settings: ClassVar[tuple[str, ...]] = ("to_rgb", "channels_last")

    def claims(self, config: Mapping[str, Any]) -> bool:
        """Image classifiers of transformers, and all of timm."""
        return any("ImageClassification" in a for a in config.get("architectures") or []) or "architecture" in config

    def wrap(self, model: nn.Module, processor: Any, labels: list[str] | None) -> Loaded:
        return wrap_module(model, processor, labels)

    def load_folder(self, folder: Path, source: str, revision: str | None) -> Loaded:
        return load_folder(folder, source, revision)

    def locate(self, source: str) -> str | None:
        if source.startswith("hf-hub:"):
            return source.removeprefix("hf-hub:")
        if "/" in source:
            return None
        import timm  # which takes its time, and is needed for its own names alone

        if not timm.is_model(source):
            return None
        return (timm.get_pretrained_cfg(source) or timm.models.PretrainedCfg()).hf_hub_id

    def creates(self, architecture: str) -> bool:
        import timm

        return timm.is_model(architecture)

    def create(self, architecture: str, classes: int, **options: Any) -> Loaded:
        import timm

        if not timm.is_model(architecture):
            raise ConfigError(f"timm has no model '{architecture}'{did_you_mean(architecture, timm.list_models())}")
        labels = options.pop("labels", None)
        loaded = new_timm(architecture, classes, **options)
        loaded.labels = list(labels or [])
        return loaded

    def channels(self, loaded: Loaded) -> int:
        """Colour channels of the input, from the first convolution."""
        first = next((m for m in loaded.model.modules() if isinstance(m, nn.Conv2d)), None)
        return first.in_channels if first is not None and first.in_channels in (1, 3) else 3

    def examples(self, data: Any, loaded: Loaded, **options: Any) -> ImageExamples:
        if isinstance(data, ImageExamples):
            return data
        return read_images(data, loaded, self.classes(loaded), Selection.of(options), self.channels(loaded), bool(options.get("to_rgb")))

    def class_names(self, data: Any, split: str | None, columns: Mapping[str, str]) -> list[str]:
        """Class names of a data set, in order."""
        return class_names(open_data(data, split, loose="imagefolder"), columns.get("label"))

    def prepare(self, raws: list[Tensor], loaded: Loaded) -> Tensor:
        return preparer(loaded.processor)(raws)

    def picture(self, raw: Tensor, clean: Tensor | None = None, seen: tuple[Any, ...] = ()) -> np.ndarray:
        return raw.permute(1, 2, 0).numpy()

    def unprepare(self, batch: Batch, row: int, data: Examples) -> Tensor:
        some = torch.arange(min(len(data), 16))
        return restored(batch["pixel_values"][row], data.batch(some)["pixel_values"], [data.raw(int(i)) for i in some])

    def calibration(self) -> Calibration | None:
        return Calibration.beside(__file__)

    def augmentations(self) -> list[str]:
        return list(AUGMENTATIONS)

    def augment(self, batch: Batch, generator: torch.Generator, kind: str) -> Batch:
        """Random crop after padding by an eighth of the side, and random horizontal flip, for each image by itself."""
        return {**batch, "pixel_values": moved(batch["pixel_values"], generator, kind)}

    def triggers(self) -> dict[str, type]:
        return dict(TRIGGERS)

    def stand_ins(self, model: nn.Module) -> dict[str, type[StandIn]]:
        return {"spectrum": Spectrum, "patch": Patches, "warp": Warp, "wave": Waves}

    def demo(self) -> Demo:
        return make_demo()

    def outline(self, config: Mapping[str, Any], length: int | None = None) -> Outline:
        return make_outline(config, length)

    def tiny(self, variant: str | None = None, seed: int = 0) -> Tiny:
        return make_tiny(variant or "resnet", seed)


def make_tiny(variant: str, seed: int) -> Tiny:
    """A random transformers classifier of four classes and eight noise images of 32 pixels."""
    from transformers import AutoModelForImageClassification as Auto
    from transformers import ConvNextConfig, ResNetConfig, SwinConfig, ViTConfig

    configs: dict[str, Any] = {
        "resnet": lambda: ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4),
        "convnext": lambda: ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2, image_size=32, num_labels=4),
        "vit": lambda: ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8, num_labels=4
        ),
        "swin": lambda: SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4, image_size=32, patch_size=2, num_labels=4),
    }
    if variant not in configs:
        raise ConfigError(f"no tiny model '{variant}'{did_you_mean(variant, configs)} (known: {', '.join(configs)})")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Auto.from_config(configs[variant]()).eval()
    generator = torch.Generator().manual_seed(seed)
    raws = [torch.randint(0, 256, (3, 32, 32), generator=generator, dtype=torch.uint8) for _ in range(8)]
    labels = torch.arange(8) % 4

    def prepare(images: list[Tensor]) -> Tensor:
        return torch.stack(images).float() / 127.5 - 1

    loaded = Loaded(model, prepare, [], f"tiny-{variant}", "transformers")
    return Tiny(loaded, ImageExamples(raws, labels, prepare), 4)
