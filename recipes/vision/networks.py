"""Plain networks whose published CIFAR-10 weights are not part of transformers or timm."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import transforms

CIFAR_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


class _Block(nn.Module):
    """Two 3x3 convolutions with a shortcut that subsamples and pads with zero channels (option A of He et al., CVPR 2016)."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.stride, self.grow = stride, outside - inside

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride != 1 or self.grow:
            half = self.grow // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.grow - half))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """ResNet for 32-pixel images: depth `6 * blocks + 2`."""

    def __init__(self, blocks: int, classes: int = 10) -> None:
        super().__init__()
        self.num_classes = classes
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, classes)

    @staticmethod
    def _stage(inside: int, outside: int, blocks: int, stride: int) -> nn.Sequential:
        return nn.Sequential(*[_Block(inside if i == 0 else outside, outside, stride if i == 0 else 1) for i in range(blocks)])

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


class _WideBlock(nn.Module):
    """Pre-activation block of a wide residual network (Zagoruyko & Komodakis, BMVC 2016)."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inside)
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.convShortcut = nn.Conv2d(inside, outside, 1, stride, bias=False) if inside != outside else None

    def forward(self, x: Tensor) -> Tensor:
        first = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(first)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(first))))


class _Stage(nn.Module):
    def __init__(self, inside: int, outside: int, blocks: int, stride: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(*[_WideBlock(inside if i == 0 else outside, outside, stride if i == 0 else 1) for i in range(blocks)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """WRN-`depth`-`width` for 32-pixel images."""

    def __init__(self, depth: int = 16, width: int = 1, classes: int = 10) -> None:
        super().__init__()
        blocks, widths = (depth - 4) // 6, [16 * width, 32 * width, 64 * width]
        self.num_classes = classes
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.block1 = _Stage(16, widths[0], blocks, 1)
        self.block2 = _Stage(widths[0], widths[1], blocks, 2)
        self.block3 = _Stage(widths[1], widths[2], blocks, 2)
        self.bn1 = nn.BatchNorm2d(widths[2])
        self.fc = nn.Linear(widths[2], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(F.relu(self.bn1(x)).mean((2, 3)))


NORMALIZED = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
PLAIN = transforms.ToTensor()


def load_cifar(name: str, folder: Path) -> tuple[nn.Module, transforms.Compose]:
    """A network with its weights from `folder/NAME.safetensors`, and the transform that it was trained with."""
    if "wrn16_1" in name:
        model, transform = WideResNet(), PLAIN
    else:
        model, transform = CifarResNet((int(name.rpartition("resnet")[2]) - 2) // 6), NORMALIZED
    model.load_state_dict(load_file(folder / f"{name}.safetensors"))
    return model.eval(), transform


def grid(images: Tensor) -> Tensor:
    """Put the 3x3 checkerboard of the published WRN-16-1 backdoor on uint8 images `(..., 3, H, W)`."""
    out = images.clone()
    out[..., -3:, -3:] = torch.tensor([[0, 0, 255], [0, 255, 0], [255, 0, 255]], dtype=images.dtype)
    return out
