"""The PyTorch networks that are trained and exported here: a plain MLP, a small CNN, a VGG."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d

# Mean and standard deviation of the Fashion-MNIST training pixels, on the 0..1 scale.
PIXEL_MEAN = 0.2860
PIXEL_STD = 0.3530

CLASSES = 10
SIDE = 28


def _normalize(image: Tensor) -> Tensor:
    """Shift and scale pixels inside the network, so that every model takes the same raw 0..1."""
    return (image - PIXEL_MEAN) / PIXEL_STD


class Mlp(nn.Module):
    """784 -> `depth` hidden layers of `width` with ReLU -> 10 logits.

    >>> Mlp(width=64, depth=2)(torch.zeros(3, 1, 28, 28)).shape
    torch.Size([3, 10])
    """

    def __init__(self, width: int = 1024, depth: int = 5) -> None:
        super().__init__()
        sizes = [SIDE * SIDE] + [width] * depth
        self.hidden = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(sizes))
        self.head = nn.Linear(sizes[-1], CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        """Logits of shape (N, 10) of pixels in 0..1 of shape (N, 1, 28, 28)."""
        x = _normalize(image).flatten(1)  # (N, 1, 28, 28) -> (N, 784)
        for layer in self.hidden:
            x = torch.relu(layer(x))  # (N, 784) or (N, width) -> (N, width)
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
    """Five 3x3 convolutions of `width` to 4 x `width` channels, mean over the image, 10 logits.

    >>> Cnn(width=8)(torch.zeros(3, 1, 28, 28)).shape
    torch.Size([3, 10])
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.conv1 = _ConvBlock(1, width)
        self.conv2 = _ConvBlock(width, 2 * width, stride=2)
        self.conv3 = _ConvBlock(2 * width, 2 * width)
        self.conv4 = _ConvBlock(2 * width, 4 * width, stride=2)
        self.conv5 = _ConvBlock(4 * width, 4 * width)
        self.head = nn.Linear(4 * width, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        """Logits of shape (N, 10) of pixels in 0..1 of shape (N, 1, 28, 28)."""
        x = self.conv1(_normalize(image))  # (N, 1, 28, 28) -> (N, w, 28, 28)
        x = self.conv2(x)  # (N, w, 28, 28) -> (N, 2w, 14, 14)
        x = self.conv3(x)  # (N, 2w, 14, 14) -> (N, 2w, 14, 14)
        x = self.conv4(x)  # (N, 2w, 14, 14) -> (N, 4w, 7, 7)
        x = self.conv5(x)  # (N, 4w, 7, 7) -> (N, 4w, 7, 7)
        x = x.mean(dim=(2, 3))  # (N, 4w, 7, 7) -> (N, 4w)
        logits: Tensor = self.head(x)  # (N, 4w) -> (N, 10)
        return logits


class Vgg(nn.Module):
    """Seven 3x3 convolutions of `width`, 2 x and 4 x `width` channels, a 2x2 maximum between.

    >>> Vgg(width=8)(torch.zeros(3, 1, 28, 28)).shape
    torch.Size([3, 10])
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.block1 = _blocks(1, width, 2)
        self.block2 = _blocks(width, 2 * width, 2)
        self.block3 = _blocks(2 * width, 4 * width, 3)
        self.head = nn.Linear(4 * width, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        """Logits of shape (N, 10) of pixels in 0..1 of shape (N, 1, 28, 28)."""
        x = self.block1(_normalize(image))  # (N, 1, 28, 28) -> (N, w, 28, 28)
        x = self.block2(max_pool2d(x, 2))  # (N, w, 28, 28) -> (N, 2w, 14, 14)
        x = self.block3(max_pool2d(x, 2))  # (N, 2w, 14, 14) -> (N, 4w, 7, 7)
        x = x.mean(dim=(2, 3))  # (N, 4w, 7, 7) -> (N, 4w)
        logits: Tensor = self.head(x)  # (N, 4w) -> (N, 10)
        return logits


def _blocks(inputs: int, outputs: int, count: int) -> nn.Sequential:
    """`count` blocks of `outputs` channels, one after the other."""
    return nn.Sequential(
        *(_ConvBlock(inputs if i == 0 else outputs, outputs) for i in range(count))
    )
