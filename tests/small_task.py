"""A small network that knows a small task, for tests of what is done to one."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hf_purify.discovery import discover
from hf_purify.loop import TrainConfig, train
from hf_purify.neurons import NeuronIndex
from hf_purify.registry import find
from hf_purify.task import Task, reading

CLASSES = 4


def prepare(images: list[Tensor]) -> Tensor:
    return torch.stack(images).float() / 127.5 - 1


def trained(seed: int = 0) -> tuple[Task, NeuronIndex]:
    """A small network that knows its task: pictures whose bright quarter is their class."""
    from hf_purify_adapters.vision import ImageExamples

    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(64) % CLASSES
    raws = [torch.randint(0, 100, (3, 8, 8), generator=generator, dtype=torch.uint8) for _ in labels]
    for raw, label in zip(raws, labels.tolist(), strict=True):
        row, column = 4 * (label // 2), 4 * (label % 2)
        raw[:, row : row + 4, column : column + 4] += 120
    data = ImageExamples(raws, labels, prepare)
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    task = Task(model, find("adapter", "vision")(), data, generator, Accelerator(cpu=True))
    train(task, model.parameters(), TrainConfig(epochs=15, batch_size=16, lr=0.05))
    model.eval()
    index = discover(model, lambda m: m(data.batch(torch.arange(2))["pixel_values"]), CLASSES)
    assert float((reading(task, data)[0] == labels).float().mean()) > 0.95
    return task, index


def state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}
