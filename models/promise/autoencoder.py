"""A small seeded autoencoder of Fashion-MNIST: a model that is no classifier."""

from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from models.reference.export import CHECK_IMAGES, export_onnx

SIZES = (784, 256, 32, 256, 784)
_EPOCHS, _BATCH, _RATE = 4, 128, 1e-3


def train_autoencoder(images: Tensor, out: Path) -> None:
    """Train it on images of shape (n, 1, 28, 28), and export it to ONNX with an open batch."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Flatten()]
    for n, m in pairwise(SIZES):
        layers += [nn.Linear(n, m), nn.ReLU()]
    layers[-1] = nn.Sigmoid()
    net = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(net.parameters(), lr=_RATE)
    order = torch.Generator().manual_seed(0)
    for _ in range(_EPOCHS):
        for index in torch.randperm(len(images), generator=order).split(_BATCH):
            batch = images[index]
            loss = nn.functional.mse_loss(net(batch), batch.flatten(1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    export_onnx(net, images[:CHECK_IMAGES], out, output="decoded")
