"""The PyTorch networks that are trained and exported here, each made to the shape of a data set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, pad

from models.reference.datasets import DataSet


class Normalize(nn.Module):
    """Shifts and scales pixels inside the network, so that every model takes the same raw 0..1."""

    def __init__(self, spec: DataSet) -> None:
        super().__init__()
        # Not persistent: a file of weights holds what is trained, and nothing else.
        self.register_buffer("mean", torch.tensor(spec.mean).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).reshape(-1, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Return pixels of shape (N, C, S, S), shifted and scaled."""
        return (image - self.mean) / self.std


class Mlp(nn.Module):
    """All pixels -> `depth` hidden layers of `width` with ReLU -> logits.

    >>> from models.reference.datasets import DATASETS
    >>> Mlp(DATASETS["mnist"], width=64, depth=2)(torch.zeros(3, 1, 28, 28)).shape
    torch.Size([3, 10])
    """

    def __init__(self, spec: DataSet, width: int = 1024, depth: int = 5) -> None:
        super().__init__()
        sizes = [spec.channels * spec.side**2] + [width] * depth
        self.normalize = Normalize(spec)
        self.hidden = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(sizes))
        self.head = nn.Linear(sizes[-1], len(spec.classes))

    def forward(self, image: Tensor) -> Tensor:
        """Return logits, (N, 10), of pixels in 0..1, (N, C, S, S)."""
        x = self.normalize(image).flatten(1)  # (N, C, S, S) -> (N, C S S)
        for layer in self.hidden:
            x = torch.relu(layer(x))  # (N, C S S) or (N, width) -> (N, width)
        logits: Tensor = self.head(x)  # (N, width) -> (N, 10)
        return logits


class _ConvBlock(nn.Module):
    """3x3 convolution, batch normalization, ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        # No bias: the batch normalization that follows would cancel it.
        self.conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        # (N, inputs, H, W) -> (N, outputs, ceil(H / stride), ceil(W / stride))
        return torch.relu(self.norm(self.conv(x)))


class Cnn(nn.Module):
    """Five 3x3 convolutions of `width` to 4 x `width` channels, mean over the image, logits.

    >>> from models.reference.datasets import DATASETS
    >>> Cnn(DATASETS["cifar10"], width=8)(torch.zeros(3, 3, 32, 32)).shape
    torch.Size([3, 10])
    """

    def __init__(self, spec: DataSet, width: int = 32) -> None:
        super().__init__()
        self.normalize = Normalize(spec)
        self.conv1 = _ConvBlock(spec.channels, width)
        self.conv2 = _ConvBlock(width, 2 * width, stride=2)
        self.conv3 = _ConvBlock(2 * width, 2 * width)
        self.conv4 = _ConvBlock(2 * width, 4 * width, stride=2)
        self.conv5 = _ConvBlock(4 * width, 4 * width)
        self.head = nn.Linear(4 * width, len(spec.classes))

    def forward(self, image: Tensor) -> Tensor:
        """Return logits, (N, 10), of pixels in 0..1, (N, C, S, S)."""
        x = self.conv1(self.normalize(image))  # (N, C, S, S) -> (N, w, S, S)
        x = self.conv2(x)  # (N, w, S, S) -> (N, 2w, S/2, S/2)
        x = self.conv3(x)  # (N, 2w, S/2, S/2) -> (N, 2w, S/2, S/2)
        x = self.conv4(x)  # (N, 2w, S/2, S/2) -> (N, 4w, S/4, S/4)
        x = self.conv5(x)  # (N, 4w, S/4, S/4) -> (N, 4w, S/4, S/4)
        x = x.mean(dim=(2, 3))  # (N, 4w, S/4, S/4) -> (N, 4w)
        logits: Tensor = self.head(x)  # (N, 4w) -> (N, 10)
        return logits


class Vgg(nn.Module):
    """Seven 3x3 convolutions of `width`, 2 x and 4 x `width` channels, a 2x2 maximum between.

    >>> from models.reference.datasets import DATASETS
    >>> Vgg(DATASETS["cifar10"], width=8)(torch.zeros(3, 3, 32, 32)).shape
    torch.Size([3, 10])
    """

    def __init__(self, spec: DataSet, width: int = 64) -> None:
        super().__init__()
        self.normalize = Normalize(spec)
        self.block1 = _blocks(spec.channels, width, 2)
        self.block2 = _blocks(width, 2 * width, 2)
        self.block3 = _blocks(2 * width, 4 * width, 3)
        self.head = nn.Linear(4 * width, len(spec.classes))

    def forward(self, image: Tensor) -> Tensor:
        """Return logits, (N, 10), of pixels in 0..1, (N, C, S, S)."""
        x = self.block1(self.normalize(image))  # (N, C, S, S) -> (N, w, S, S)
        x = self.block2(max_pool2d(x, 2))  # (N, w, S, S) -> (N, 2w, S/2, S/2)
        x = self.block3(max_pool2d(x, 2))  # (N, 2w, S/2, S/2) -> (N, 4w, S/4, S/4)
        x = x.mean(dim=(2, 3))  # (N, 4w, S/4, S/4) -> (N, 4w)
        logits: Tensor = self.head(x)  # (N, 4w) -> (N, 10)
        return logits


def _blocks(inputs: int, outputs: int, count: int) -> nn.Sequential:
    """Return `count` blocks of `outputs` channels, one after the other."""
    return nn.Sequential(
        *(_ConvBlock(inputs if i == 0 else outputs, outputs) for i in range(count))
    )


class LeNet(nn.Module):
    """Two 5x5 convolutions with a 2x2 maximum after each, three linear layers; no padding.

    Of `width` 6 it's the one of many tutorials: 6 and 16 channels, 120 and 84 units, 10 logits.

    >>> from models.reference.datasets import DATASETS
    >>> LeNet(DATASETS["cifar10"])(torch.zeros(3, 3, 32, 32)).shape
    torch.Size([3, 10])
    """

    def __init__(self, spec: DataSet, width: int = 6) -> None:
        super().__init__()
        self.normalize = Normalize(spec)
        more = 8 * width // 3
        side = ((spec.side - 4) // 2 - 4) // 2  # 28 -> 4, 32 -> 5
        self.conv1 = nn.Conv2d(spec.channels, width, 5)
        self.conv2 = nn.Conv2d(width, more, 5)
        self.fc1 = nn.Linear(more * side * side, 20 * width)
        self.fc2 = nn.Linear(20 * width, 14 * width)
        self.fc3 = nn.Linear(14 * width, len(spec.classes))

    def forward(self, image: Tensor) -> Tensor:
        """Return logits, (N, 10), of pixels in 0..1, (N, C, S, S)."""
        x = torch.relu(self.conv1(self.normalize(image)))  # (N, 3, 32, 32) -> (N, 6, 28, 28)
        x = torch.relu(self.conv2(max_pool2d(x, 2)))  # (N, 6, 28, 28) -> (N, 16, 10, 10)
        x = max_pool2d(x, 2).flatten(1)  # (N, 16, 10, 10) -> (N, 400)
        x = torch.relu(self.fc1(x))  # (N, 400) -> (N, 120)
        x = torch.relu(self.fc2(x))  # (N, 120) -> (N, 84)
        logits: Tensor = self.fc3(x)  # (N, 84) -> (N, 10)
        return logits


class _ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut that has no weights (He et al. 2015, option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.more = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        # (N, inputs, H, W) -> (N, outputs, ceil(H / stride), ceil(W / stride))
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride > 1 or self.more:
            half = self.more // 2  # every second pixel, zeros for the channels that are new
            x = pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.more - half))
        return torch.relu(y + x)


class ResNet(nn.Module):
    """6n + 2 layers: a stem, three stages of n blocks with 1, 2, 4 x `width` channels, logits.

    >>> from models.reference.datasets import DATASETS
    >>> ResNet(DATASETS["cifar10"], depth=20)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(self, spec: DataSet, width: int = 16, depth: int = 32) -> None:
        super().__init__()
        n = (depth - 2) // 6
        self.normalize = Normalize(spec)
        self.conv1 = nn.Conv2d(spec.channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, n, 1)
        self.layer2 = _stage(width, 2 * width, n, 2)
        self.layer3 = _stage(2 * width, 4 * width, n, 2)
        self.linear = nn.Linear(4 * width, len(spec.classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)  # as the paper draws them

    def forward(self, image: Tensor) -> Tensor:
        """Return logits, (N, 10), of pixels in 0..1, (N, C, S, S)."""
        x = self.conv1(self.normalize(image))  # (N, C, S, S) -> (N, w, S, S)
        x = self.layer1(torch.relu(self.bn1(x)))  # (N, w, S, S) -> (N, w, S, S)
        x = self.layer2(x)  # (N, w, S, S) -> (N, 2w, S/2, S/2)
        x = self.layer3(x)  # (N, 2w, S/2, S/2) -> (N, 4w, S/4, S/4)
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))  # (N, 4w, S/4, S/4) -> (N, 10)
        return logits


def _stage(inputs: int, outputs: int, n: int, stride: int) -> nn.Sequential:
    """Return `n` residual blocks, of which the first may halve the image."""
    blocks = [_ResidualBlock(inputs, outputs, stride)]
    blocks += [_ResidualBlock(outputs, outputs, 1) for _ in range(n - 1)]
    return nn.Sequential(*blocks)


@dataclass(frozen=True)
class Network:
    """How a network is made, and how it's trained by default."""

    build: Callable[[DataSet, int], nn.Module]
    """Of a data set and a width."""
    width: int
    epochs: int
    lr: float
    augmented: bool = True
    """Whether it gains from mirrored and shifted images: one without convolutions doesn't."""
    sgd: bool = False
    """Nesterov's momentum with weight decay, as residual networks are trained; Adam otherwise."""
    channels_last: bool = False
    """The layout of images and kernels that wide convolutions are faster in."""


NETWORKS = {
    "mlp": Network(Mlp, width=1024, epochs=15, lr=1e-3, augmented=False),
    "cnn": Network(Cnn, width=32, epochs=8, lr=2e-3),
    "vgg": Network(Vgg, width=64, epochs=6, lr=1e-3, channels_last=True),
    "lenet": Network(LeNet, width=6, epochs=15, lr=1e-3),
    **{
        f"resnet{depth}": Network(
            partial(ResNet, depth=depth),
            width=16,
            epochs=30,
            lr=0.1,
            sgd=True,
            channels_last=True,
        )
        for depth in (20, 32, 56)
    },
}
