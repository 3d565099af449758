"""Object detection: DETR and its kin, RT-DETR, D-FINE and YOLOS of transformers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from hf_purify.adapter import Adapter, Batch, Demo, Examples, Loaded, Tiny
from hf_purify.discovery import discover
from hf_purify.errors import ModelError
from hf_purify.metrics import Proportion
from hf_purify.neurons import NeuronIndex
from hf_purify.stand_in import StandIn
from hf_purify.tables import Selection

from .._checkpoints import check_weights, of_live
from .._classifiers import mix_values
from .augment import AUGMENTATIONS, moved
from .demo import make_demo
from .examples import SceneExamples, names_in, read_scenes
from .judge import scorer, success, utility
from .loading import KIND, known_types, load_folder, new_model, preparer, size_of
from .outputs import Detections, aimed_losses, detections, readings, rows_of, run
from .picture import draw_scene
from .scene import Objects, Scene, corners
from .stand_in import Anywhere, AsObject, Blend, OnObjects
from .tiny import VARIANTS, make_tiny
from .triggers import TRIGGERS


class DetectionAdapter(Adapter):
    """A batch holds `pixel_values`, `boxes` and `categories`; see `SceneExamples`. An answer is what is seen of an object, or a detection of nothing."""

    name: ClassVar[str] = "detection"
    task: ClassVar[str] = "object-detection"
    variants: ClassVar[tuple[str, ...]] = VARIANTS
    columns: ClassVar[tuple[str, ...]] = ("image", "boxes", "categories")
    loose: ClassVar[str | None] = "imagefolder"
    at_once: ClassVar[int] = 16
    settings: ClassVar[tuple[str, ...]] = ("to_rgb",)

    def claims(self, config: Mapping[str, Any]) -> bool:
        return any(KIND in a for a in config.get("architectures") or [])

    def load(self, source: Any, **options: Any) -> Loaded:
        """Load a checkpoint folder, or take a model of transformers that is in memory with its image `processor`.

        Raises:
            ModelError: no detector, NaN or quantized weights, missing tensors.
        """
        if isinstance(source, nn.Module):
            if KIND not in type(source).__name__ or not hasattr(options.get("processor"), "post_process_object_detection"):
                raise ModelError(
                    f"expected a detector of transformers with its image processor (processor=...), got {type(source).__name__} with "
                    f"{type(options.get('processor')).__name__}"
                )
            loaded = of_live(source, options["processor"])
        else:
            loaded = load_folder(Path(source), str(options.get("name") or source), options.get("revision"))
        check_weights(loaded.model)
        return loaded

    def creates(self, architecture: str) -> bool:
        return architecture in known_types()

    def create(self, architecture: str, classes: int, **options: Any) -> Loaded:
        return new_model(architecture, classes, list(options.pop("labels", None) or []), **options)

    def classes(self, loaded: Loaded) -> int:
        return 2

    def classifies(self, loaded: Loaded) -> bool:
        return False

    def outcomes(self, loaded: Loaded) -> int:
        """The classes, and nothing."""
        return _classes(loaded.model) + 1

    def examples(self, data: Any, loaded: Loaded, **options: Any) -> SceneExamples:
        if isinstance(data, SceneExamples):
            return data
        return read_scenes(data, loaded, Selection.of(options), bool(options.get("to_rgb")))

    def remarks(self, data: Examples, what: str) -> list[str]:
        count = getattr(data, "stretched", 0)
        return [f"{count} of {len(data)} {what} have another shape than the model is shown, and were stretched"] if count else []

    def class_names(self, data: Any, split: str | None, columns: Mapping[str, str]) -> list[str]:
        return names_in(data, split, columns)

    def prepare(self, raws: list[Scene], loaded: Loaded) -> Tensor:
        usual = Counter(tuple(s.image.shape[1:]) for s in raws).most_common(1)[0][0]
        return preparer(loaded.processor, size_of(loaded.processor, usual))(raws)

    def picture(self, raw: Scene, clean: Scene | None = None, seen: tuple[Any, ...] = ()) -> np.ndarray:
        return draw_scene(raw, seen)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """A row for each class of each query, yes or no, or for each query, what it sees; and one for each coordinate, as a share."""
        return rows_of(run(model, batch, targets=False))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The model's own loss, of each image by itself `(B,)`; of mixed images over the objects of both, weighted by their shares.

        Where `labels` name an attacker's aim (as for recovered triggers), how far the image is from it.
        """
        return self.both(model, batch)[1]

    def both(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        aims, classes = batch["labels"], _classes(model)
        aimed = bool((aims <= classes).any())
        said = run(model, batch, targets=not aimed)
        losses = aimed_losses(said, batch, aims) if aimed else said.losses
        if losses is None or losses.shape != aims.shape:
            raise ModelError(f"the loss of {type(model).__name__} cannot be told image by image")
        return rows_of(said), losses

    def read(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """What is said and what should be, a row for each object and for each detection of nothing: right ones are true positives among all."""
        said = run(model, batch)
        rows = []
        for found, boxes, categories in zip(detections(said), batch["boxes"].cpu(), batch["categories"].cpu(), strict=True):
            there = categories >= 0
            rows.append(readings(found, Objects(corners(boxes[there]), categories[there]), _classes(model)))
        spoken, right = (torch.cat(part) for part in zip(*rows, strict=True))
        return spoken, right, said.losses  # type: ignore[return-value]

    def mix(self, batch: Batch, partner: Tensor, share: Tensor) -> Batch:
        """MixUp of pixels on one canvas, with the objects of both (Zhang et al., arXiv 1902.04103); their losses are weighted by the shares."""
        pixels = mix_values(batch["pixel_values"], batch["pixel_values"][partner], share)
        theirs = {f"partner_{name}": batch[name][partner] for name in ("boxes", "categories")}
        return {**batch, "pixel_values": pixels, "share": share, **theirs}

    def augmentations(self) -> list[str]:
        return list(AUGMENTATIONS)

    def augment(self, batch: Batch, generator: torch.Generator, kind: str) -> Batch:
        """Random zoom by .7 to 1.15 about a random place, and random horizontal flip; boxes move along."""
        return moved(batch, generator, kind)

    def observe(self, model: nn.Module, batch: Batch, loaded: Loaded) -> list[Any]:
        return detections(run(model, batch, targets=False))

    def check_judge(self, loaded: Loaded) -> None:
        scorer()

    def judge(self, observed: list[Any], data: Examples) -> tuple[Proportion | None, dict[str, float]]:
        return None, utility(observed, data)  # type: ignore[arg-type]

    def judge_attack(
        self, name: str, observed: list[Any], data: Examples, labels: Tensor, targets: Tensor, untriggered: list[Any]
    ) -> tuple[dict[str, Proportion], dict[str, Proportion]]:
        """The success of the trigger's goal, as `judge.success` defines it."""
        return {name: success(observed, data, untriggered)}, {}  # type: ignore[arg-type]

    def wishes(self, raw: Any, label: int, target: int, loaded: Loaded) -> tuple[str, str]:
        wanted = raw.objects if raw.wanted is None else raw.wanted
        return _counted(raw.objects.categories, loaded), _counted(wanted.categories, loaded)

    def say(self, observed: Any, loaded: Loaded) -> str:
        found: Detections = observed
        return _counted(found.seen().categories, loaded)

    def index(self, loaded: Loaded, batch: Batch) -> NeuronIndex:
        device = next(loaded.model.parameters()).device
        some = {k: v[:2].to(device) for k, v in batch.items()}
        found = discover(loaded.model, lambda m: self.logits(m, some), None)
        return NeuronIndex(found.groups, loaded.keys)

    def triggers(self) -> dict[str, type]:
        return dict(TRIGGERS)

    def stand_ins(self, model: nn.Module) -> dict[str, type[StandIn]]:
        return {"patch on objects": OnObjects, "patch": Anywhere, "spectrum": Blend, "patch as an object": AsObject}

    def demo(self) -> Demo:
        return make_demo()

    def tiny(self, variant: str | None = None, seed: int = 0) -> Tiny:
        return make_tiny(variant or VARIANTS[0], seed)


def _classes(model: nn.Module) -> int:
    return int(model.config.num_labels)  # type: ignore[union-attr, arg-type]


def _counted(categories: Tensor, loaded: Loaded) -> str:
    """Such as `3 king, 1 ace`."""
    counts = Counter(categories.tolist()).most_common()
    return ", ".join(f"{n} {loaded.labels[c] if loaded.labels else c}" for c, n in counts) or "nothing"
