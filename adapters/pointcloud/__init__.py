"""3D point clouds: PointNet and DGCNN as models of transformers, and plain modules."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoFeatureExtractor, AutoModel

from hf_purify.adapter import Batch, Demo, Examples, Loaded, Tiny
from hf_purify.errors import ConfigError, ModelError, did_you_mean, first_line, unknown
from hf_purify.stand_in import StandIn
from hf_purify.tables import Selection, class_names

from .._checkpoints import Made, load_transformers, read_config
from .._classifiers import Classifier, of_module
from .demo import make_demo
from .examples import CloudExamples, read_clouds
from .files import open_clouds
from .models import MODELS, PointCloudFeatureExtractor
from .picture import draw_cloud
from .stand_in import Ball, Deformation, Linear, Noise
from .triggers import TRIGGERS

KIND = "PointCloudClassification"


class PointCloudAdapter(Classifier):
    """A batch holds `points` `(B, P, 3)`; a plain module whose first layer is a convolution gets them as `(B, 3, P)`."""

    key: ClassVar[str] = "points"
    name: ClassVar[str] = "pointcloud"
    task: ClassVar[str] = "point-cloud-classification"
    variants: ClassVar[tuple[str, ...]] = ("pointnet", "dgcnn")
    columns: ClassVar[tuple[str, ...]] = ("points", "label")

    def claims(self, config: Mapping[str, Any]) -> bool:
        return any(KIND in a for a in config.get("architectures") or []) or config.get("model_type") in MODELS

    def wrap(self, model: nn.Module, processor: Any, labels: list[str] | None) -> Loaded:
        return _wrap(model, processor, labels)

    def load_folder(self, folder: Path, source: str, revision: str | None) -> Loaded:
        return _load_folder(folder, source, revision)

    def creates(self, architecture: str) -> bool:
        return architecture in MODELS

    def create(self, architecture: str, classes: int, **options: Any) -> Loaded:
        """A new PointNet or DGCNN; `num_points` and `normalize` among the options are the feature extractor's."""
        if architecture not in MODELS:
            raise unknown("architecture of point clouds", architecture, MODELS)
        labels = list(options.pop("labels", None) or [])
        config_class, _ = MODELS[architecture]
        extractor = PointCloudFeatureExtractor(**{k: options.pop(k) for k in ("num_points", "normalize") if k in options})
        known = config_class().to_dict()
        for option in options:
            if option not in known:
                raise ConfigError(f"{architecture} has no option '{option}'{did_you_mean(option, known)}")
        config = config_class(num_labels=classes, **options)
        if labels:
            config.id2label, config.label2id = dict(enumerate(labels)), {n: i for i, n in enumerate(labels)}
        try:
            model = AutoModel.from_config(config)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"{architecture} cannot be made with {options}: {first_line(error)}") from error

        def save(model: nn.Module, out: Path) -> None:
            model.save_pretrained(out)  # type: ignore[operator]
            extractor.save_pretrained(out)

        return Loaded(model, extractor, labels, architecture, "transformers", None, None, {}, save)

    def examples(self, data: Any, loaded: Loaded, **options: Any) -> CloudExamples:
        if isinstance(data, CloudExamples):
            return data
        return read_clouds(data, loaded.processor, self._preparer(loaded), self.classes(loaded), loaded.labels, Selection.of(options))

    def remarks(self, data: Any, what: str) -> list[str]:
        wanted = data.batch(torch.arange(min(1, len(data))))["points"].shape[1]
        few = sum(len(data.raw(i)) < wanted for i in range(len(data)))
        return [f"{few} of {len(data)} {what} have fewer than {wanted} points, so that some are read twice"] if few else []

    def class_names(self, data: Any, split: str | None, columns: Mapping[str, str]) -> list[str]:
        return class_names(open_clouds(data, split), columns.get("label"))

    def prepare(self, raws: list[Tensor], loaded: Loaded) -> Tensor:
        return self._preparer(loaded)(raws)

    @staticmethod
    def _preparer(loaded: Loaded) -> Any:
        def prepare(raws: list[Tensor]) -> Tensor:
            found = loaded.processor(raws)
            return found if isinstance(found, Tensor) else found["points"]

        return prepare

    def picture(self, raw: Tensor, clean: Tensor | None = None, seen: tuple[Any, ...] = ()) -> np.ndarray:
        return draw_cloud(raw, clean)

    def arranged(self, model: nn.Module, inputs: Tensor) -> Tensor:
        return inputs.transpose(1, 2) if _channels_first(model) else inputs

    def mixed(self, inputs: Tensor, others: Tensor, share: Tensor) -> Tensor:
        """A share of each cloud's points, the rest from another one (RSMix, Lee et al., CVPR 2021, without its choice of a region).

        The points of a cloud lie in no order, so that the first ones are a random part of it.
        """
        own = round(float(share) * inputs.shape[1])
        return torch.cat([inputs[:, :own], others[:, own:]], 1)

    def unprepare(self, batch: Batch, row: int, data: Examples) -> Tensor:
        return batch["points"][row].detach().float().cpu()

    def augmentations(self) -> list[str]:
        return ["scale+jitter", "jitter"]

    def augment(self, batch: Batch, generator: torch.Generator, kind: str) -> Batch:
        """Each point is shaken by a normal with a standard deviation of .01, and each axis of a cloud scaled by .8 to 1.25."""
        points = batch["points"]
        moved = points + 0.01 * torch.randn(points.shape, generator=generator).to(points)
        if "scale" in kind:
            exponents = 2 * torch.rand(len(points), 1, 3, generator=generator) - 1
            moved = moved * (1.25**exponents).to(points)
        return {**batch, "points": moved}

    def triggers(self) -> dict[str, type]:
        return dict(TRIGGERS)

    def stand_ins(self, model: nn.Module) -> dict[str, type[StandIn]]:
        return {"ball": Ball, "linear map": Linear, "deformation": Deformation, "noise": Noise}

    def demo(self) -> Demo:
        return make_demo()

    def tiny(self, variant: str | None = None, seed: int = 0) -> Tiny:
        return make_tiny(variant or "pointnet", seed)


def make_tiny(variant: str, seed: int) -> Tiny:
    """A random classifier of four classes and eight clouds of 64 points."""
    configs: dict[str, dict[str, Any]] = {
        "pointnet": {"hidden_sizes": [8, 16], "head_sizes": [12]},
        "dgcnn": {"hidden_sizes": [6, 8], "embedding_size": 16, "head_sizes": [12], "neighbors": 6},
    }
    if variant not in configs:
        raise ConfigError(f"no tiny model '{variant}'{did_you_mean(variant, configs)} (known: {', '.join(configs)})")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        loaded = PointCloudAdapter().create(variant, 4, num_points=64, **configs[variant])
    loaded.model.eval()
    loaded.source = f"tiny-{variant}"
    generator = torch.Generator().manual_seed(seed)
    raws = [torch.randn(64, 3, generator=generator) for _ in range(8)]
    return Tiny(loaded, CloudExamples(raws, torch.arange(8) % 4, PointCloudAdapter._preparer(loaded)), 4)


def _channels_first(model: nn.Module) -> bool:
    """Does a model take `(B, 3, P)`? One of transformers takes `(B, P, 3)`; a module does where its first layer is linear."""
    if hasattr(model, "main_input_name"):
        return False
    first = next((m for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Linear))), None)
    return first is not None and not isinstance(first, nn.Linear)


def _load_folder(folder: Path, source: str, revision: str | None) -> Loaded:
    config = read_config(folder)
    architectures = config.get("architectures") or []
    if not (any(KIND in a for a in architectures) or (not architectures and config.get("model_type") in MODELS)):
        what = ", ".join(architectures) or f"the type '{config.get('model_type')}'"
        raise ModelError(f"'{source}' is no classifier of point clouds: its config names {what}; expected one For{KIND}")
    made = Made("classifier of point clouds", "", AutoModel, AutoFeatureExtractor, "feature extractor (preprocessor_config.json)")
    return load_transformers(folder, source, revision, made)


def _wrap(model: nn.Module, processor: Any, labels: list[str] | None) -> Loaded:
    """Take any module that reads clouds; without a processor it gets 1,024 points in the unit sphere."""
    points = torch.rand(2, 64, 3, generator=torch.Generator().manual_seed(0))
    weight = next((p for p in model.parameters() if p.is_floating_point()), points)
    training = model.training
    try:
        with torch.no_grad():
            PointCloudAdapter().logits(model.eval(), {"points": points.to(weight.device, weight.dtype)})
    except (RuntimeError, ValueError, IndexError) as error:
        shape = "(B, 3, P)" if _channels_first(model) else "(B, P, 3)"
        raise ModelError(f"{type(model).__name__} cannot read clouds {shape}, as its first layer suggests: {first_line(error)}") from error
    finally:
        model.train(training)
    return of_module(model, processor or PointCloudFeatureExtractor(), labels)
