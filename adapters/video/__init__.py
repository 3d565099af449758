"""Video classification: VideoMAE, TimeSformer, ViViT, V-JEPA 2, and 3D convolutional networks as plain modules."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_purify.adapter import Batch, Demo, Examples, Loaded, Tiny
from hf_purify.stand_in import StandIn
from hf_purify.tables import Selection, class_names

from .._classifiers import Classifier
from .._pixels import AUGMENTATIONS, moved, restored
from ..vision.stand_in import Patches, Spectrum, Warp
from .demo import make_demo
from .examples import ClipExamples, open_clips, read_clips
from .loading import KIND, known_types, load_folder, new_model, preparer, takes_channels_first, wrap_module
from .stand_in import Light, MovingPatches
from .tiny import VARIANTS, make_tiny
from .triggers import TRIGGERS

SHOWN = 9  # frames of a picture


class VideoAdapter(Classifier):
    """A batch holds `pixel_values` `(B, T, C, H, W)`; a plain module that begins with a 3D convolution gets them as `(B, C, T, H, W)`."""

    key: ClassVar[str] = "pixel_values"
    name: ClassVar[str] = "video"
    task: ClassVar[str] = "video-classification"
    variants: ClassVar[tuple[str, ...]] = VARIANTS
    columns: ClassVar[tuple[str, ...]] = ("video", "label")
    settings: ClassVar[tuple[str, ...]] = ("to_rgb",)

    def claims(self, config: Mapping[str, Any]) -> bool:
        return any(KIND in a for a in config.get("architectures") or [])

    def wrap(self, model: nn.Module, processor: Any, labels: list[str] | None) -> Loaded:
        return wrap_module(model, processor, labels)

    def load_folder(self, folder: Path, source: str, revision: str | None) -> Loaded:
        return load_folder(folder, source, revision)

    def creates(self, architecture: str) -> bool:
        return architecture in known_types()

    def create(self, architecture: str, classes: int, **options: Any) -> Loaded:
        return new_model(architecture, classes, list(options.pop("labels", None) or []), **options)

    def examples(self, data: Any, loaded: Loaded, **options: Any) -> ClipExamples:
        if isinstance(data, ClipExamples):
            return data
        return read_clips(data, loaded, self.classes(loaded), Selection.of(options), bool(options.get("to_rgb")))

    def remarks(self, data: Examples, what: str) -> list[str]:
        short = getattr(data, "short", 0)
        return [f"{short} of {len(data)} {what} have fewer frames than the model sees, so that some are shown twice"] if short else []

    def class_names(self, data: Any, split: str | None, columns: Mapping[str, str]) -> list[str]:
        return class_names(open_clips(data, split), columns.get("label"))

    def prepare(self, raws: list[Tensor], loaded: Loaded) -> Tensor:
        return preparer(loaded.processor)(raws)

    def picture(self, raw: Tensor, clean: Tensor | None = None, seen: tuple[Any, ...] = ()) -> np.ndarray:
        """Nine frames, from the first to the last, line by line."""
        places = torch.linspace(0, len(raw) - 1, SHOWN).round().long()
        frames = F.pad(raw[places], (1, 1, 1, 1), value=255)
        lines = [torch.cat(list(line), 2) for line in frames.split(3)]
        return torch.cat(lines, 1).permute(1, 2, 0).numpy()

    def unprepare(self, batch: Batch, row: int, data: Examples) -> Tensor:
        some = torch.arange(min(len(data), 16))
        return restored(batch["pixel_values"][row], data.batch(some)["pixel_values"], [data.raw(int(i)) for i in some])

    def arranged(self, model: nn.Module, inputs: Tensor) -> Tensor:
        return inputs.transpose(1, 2) if takes_channels_first(model) else inputs

    def augmentations(self) -> list[str]:
        return list(AUGMENTATIONS)

    def augment(self, batch: Batch, generator: torch.Generator, kind: str) -> Batch:
        """Random crop after padding by an eighth of the side, and random horizontal flip, all frames of a clip alike."""
        clips = batch["pixel_values"]
        return {**batch, "pixel_values": moved(clips.flatten(1, 2), generator, kind).view_as(clips)}

    def triggers(self) -> dict[str, type]:
        return dict(TRIGGERS)

    def stand_ins(self, model: nn.Module) -> dict[str, type[StandIn]]:
        return {"spectrum": Spectrum, "patch": Patches, "warp": Warp, "moving patch": MovingPatches, "light": Light}

    def demo(self) -> Demo:
        return make_demo()

    def tiny(self, variant: str | None = None, seed: int = 0) -> Tiny:
        return make_tiny(variant or VARIANTS[0], seed)
