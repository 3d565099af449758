"""PointNet and DGCNN in transformers' manner, with what prepares clouds for them; registered with the Auto classes on import."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.feature_extraction_utils import BatchFeature, FeatureExtractionMixin
from transformers.utils import ModelOutput


class PointNetConfig(PreTrainedConfig):
    """Config of PointNet.

    Args:
        hidden_sizes: channels of the layers that see each point by itself, first to last.
        head_sizes: of the layers behind the maximum over all points, without the classes.
        dropout: in front of the last layer.
    """

    model_type = "pointnet"

    def __init__(
        self,
        hidden_sizes: Sequence[int] = (64, 64, 64, 128, 1024),
        head_sizes: Sequence[int] = (512, 256),
        dropout: float = 0.3,
        **kwargs: Any,
    ) -> None:
        self.hidden_sizes, self.head_sizes, self.dropout = list(hidden_sizes), list(head_sizes), dropout
        super().__init__(**kwargs)


class DGCNNConfig(PreTrainedConfig):
    """Config of DGCNN.

    Args:
        hidden_sizes: channels of the edge convolutions.
        embedding_size: channels of the layer that reads all of them, in front of the pooling over points.
        head_sizes: of the layers behind it, without the classes.
        neighbors: points that each point looks at.
        dropout: in front of the last layer.
    """

    model_type = "dgcnn"

    def __init__(
        self,
        hidden_sizes: Sequence[int] = (64, 64, 128, 256),
        embedding_size: int = 1024,
        head_sizes: Sequence[int] = (512, 256),
        neighbors: int = 20,
        dropout: float = 0.5,
        **kwargs: Any,
    ) -> None:
        self.hidden_sizes, self.head_sizes = list(hidden_sizes), list(head_sizes)
        self.embedding_size, self.neighbors, self.dropout = embedding_size, neighbors, dropout
        super().__init__(**kwargs)


@dataclass
class PointCloudClassifierOutput(ModelOutput):
    """What a classifier of point clouds says: `logits` `(B, classes)`, and the mean cross entropy where labels were given."""

    loss: Tensor | None = None
    logits: Tensor | None = None


class _Classifier(PreTrainedModel):
    """What both have: a head on features of the whole cloud, and the initial weights."""

    main_input_name = "points"

    def _head(self, inside: int) -> nn.ModuleList:
        sizes = [inside, *self.config.head_sizes]
        layers = [_layer(nn.Linear(a, b, bias=False), nn.BatchNorm1d(b)) for a, b in itertools.pairwise(sizes)]
        return nn.ModuleList([*layers, nn.Dropout(self.config.dropout), nn.Linear(sizes[-1], self.config.num_labels)])

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def _answer(self, features: Tensor, labels: Tensor | None) -> PointCloudClassifierOutput:
        """Logits, and with labels `(B,)` a loss, from features of whole clouds `(B, D)`."""
        x = features
        for layer in self.head:
            x = layer(x)
        return PointCloudClassifierOutput(None if labels is None else F.cross_entropy(x.float(), labels), x)


def _layer(linear: nn.Module, norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(linear, norm, nn.ReLU())


class PointNetForPointCloudClassification(_Classifier):
    """PointNet without the learned transforms of its input (Qi et al., CVPR 2017, arXiv 1612.00593)."""

    config_class = PointNetConfig

    def __init__(self, config: PointNetConfig) -> None:
        super().__init__(config)
        sizes = [3, *config.hidden_sizes]
        pairs = itertools.pairwise(sizes)
        self.layers = nn.ModuleList(_layer(nn.Conv1d(a, b, 1, bias=False), nn.BatchNorm1d(b)) for a, b in pairs)
        self.head = self._head(sizes[-1])
        self.post_init()

    def forward(self, points: Tensor, labels: Tensor | None = None, **_: Any) -> PointCloudClassifierOutput:
        """Args:
        points: `(B, P, 3)`, in the unit sphere as the feature extractor gives them.
        labels: `(B,)`.
        """
        x = points.transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return self._answer(x.amax(-1), labels)


class DGCNNForPointCloudClassification(_Classifier):
    """Dynamic graph CNN: each point looks at its nearest neighbours among the features (Wang et al., ACM TOG 2019, arXiv 1801.07829)."""

    config_class = DGCNNConfig

    def __init__(self, config: DGCNNConfig) -> None:
        super().__init__(config)
        sizes = [3, *config.hidden_sizes]
        pairs = itertools.pairwise(sizes)
        self.layers = nn.ModuleList(_layer(nn.Conv2d(2 * a, b, 1, bias=False), nn.BatchNorm2d(b)) for a, b in pairs)
        self.embedding = _layer(
            nn.Conv1d(sum(config.hidden_sizes), config.embedding_size, 1, bias=False), nn.BatchNorm1d(config.embedding_size)
        )
        self.head = self._head(2 * config.embedding_size)
        self.post_init()

    def forward(self, points: Tensor, labels: Tensor | None = None, **_: Any) -> PointCloudClassifierOutput:
        """As `PointNetForPointCloudClassification.forward`."""
        x, found = points, []
        for layer in self.layers:
            x = layer(_edges(x, self.config.neighbors)).amax(-1).transpose(1, 2)
            found.append(x)
        x = self.embedding(torch.cat(found, -1).transpose(1, 2))
        return self._answer(torch.cat([x.amax(-1), x.mean(-1)], 1), labels)


def _edges(x: Tensor, neighbors: int) -> Tensor:
    """Each point `(B, P, C)` beside the way to each of its nearest neighbours, itself among them: `(B, 2C, P, k)`."""
    with torch.no_grad():
        near = torch.cdist(x.float(), x.float()).topk(min(neighbors, x.shape[1]), largest=False).indices
    others = x[torch.arange(len(x), device=x.device)[:, None, None], near]
    own = x[:, :, None].expand_as(others)
    return torch.cat([others - own, own], -1).permute(0, 3, 1, 2)


class PointCloudFeatureExtractor(FeatureExtractionMixin):
    """Centres a cloud on its mean, scales it to the unit sphere, and draws points from it, the same ones each time.

    Args:
        num_points: that the model reads. A cloud that has fewer repeats some.
        normalize: centre and scale; else points stay where they are.
    """

    model_input_names = ["points"]  # noqa: RUF012 - as transformers declares it

    def __init__(self, num_points: int = 1024, normalize: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_points, self.normalize = num_points, normalize

    def __call__(self, clouds: Any, return_tensors: str | None = "pt") -> BatchFeature:
        """Args:
        clouds: one cloud `(P, 3)`, or several, as tensors, arrays or lists.
        """
        several = clouds if torch.as_tensor(clouds[0]).dim() == 2 else [clouds]
        return BatchFeature({"points": torch.stack([self._one(torch.as_tensor(c)) for c in several])}, tensor_type=return_tensors)

    def _one(self, cloud: Tensor) -> Tensor:
        cloud = unit_sphere(cloud) if self.normalize else cloud.float()
        return cloud[_drawn(len(cloud), self.num_points)]


def unit_sphere(cloud: Tensor) -> Tensor:
    """A cloud `(P, 3)` centred on its mean, its farthest point at a distance of 1; computed in double precision."""
    wide = cloud.double()
    centred = wide - wide.mean(0)
    return (centred / centred.norm(dim=1).max().clamp(min=1e-30)).float()


@functools.lru_cache(maxsize=64)
def _drawn(there: int, wanted: int) -> Tensor:
    """Which of `there` points a model reads `(wanted,)`: each at most once more than any other."""
    order = torch.randperm(there, generator=torch.Generator().manual_seed(0))
    return order.repeat(-(-wanted // there))[:wanted]


MODELS: dict[str, tuple[type[PreTrainedConfig], type[_Classifier]]] = {
    config.model_type: (config, model)
    for config, model in ((PointNetConfig, PointNetForPointCloudClassification), (DGCNNConfig, DGCNNForPointCloudClassification))
}
for _name, (_config, _model) in MODELS.items():
    AutoConfig.register(_name, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoFeatureExtractor.register(_config, PointCloudFeatureExtractor, exist_ok=True)
