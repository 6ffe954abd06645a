"""CIFAR ResNets with option-A shortcuts, and the command that exports a trained ResNet-32.

``python -m models.resnet --data-dir DIR --out FOLDER`` reads ``resnet32-cifar10-weights.npz`` and
``cifar10-exact-subset.npz`` from a folder, and writes ``resnet32.onnx``, ``calibration.npz`` (1,024
unlabelled training images) and ``test.npz`` (the labelled test images) for the experiments.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from models.export import export_onnx

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
CALIBRATION_IMAGES = 1024


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut that has no weights (He et al. 2015, option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.more = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) to (N, out, H/s, W/s)."""
        y = torch.relu(self.bn1(self.conv1(x)))  # (N, in, H, W) -> (N, out, H/s, W/s)
        y = self.bn2(self.conv2(y))  # (N, out, H/s, W/s)
        if self.stride > 1 or self.more:
            half = self.more // 2  # every second pixel, zeros for the channels that are new
            x = pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        return torch.relu(y + x)


class ResNet(nn.Module):
    """6n + 2 layers: a stem, three stages of n blocks with 16, 32, 64 channels, 10 logits.

    >>> ResNet(20)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(self, depth: int = 32) -> None:
        super().__init__()
        n = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, n, 1)
        self.layer2 = self._stage(16, 32, n, 2)
        self.layer3 = self._stage(32, 64, n, 2)
        self.linear = nn.Linear(64, 10)
        self.register_buffer("mean", torch.tensor(MEAN).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).reshape(1, 3, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    @staticmethod
    def _stage(inputs: int, outputs: int, n: int, stride: int) -> nn.Sequential:
        blocks = [Block(inputs, outputs, stride)]
        blocks += [Block(outputs, outputs, 1) for _ in range(n - 1)]
        return nn.Sequential(*blocks)

    def forward(self, image: Tensor) -> Tensor:
        """Logits of shape (N, 10) of pixels in 0..1 of shape (N, 3, 32, 32)."""
        x = (image - self.mean) / self.std
        x = torch.relu(self.bn1(self.conv1(x)))  # (N, 3, 32, 32) -> (N, 16, 32, 32)
        x = self.layer3(self.layer2(self.layer1(x)))  # -> (N, 64, 8, 8)
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))  # (N, 64) -> (N, 10)
        return logits


def load_trained(data_dir: Path) -> ResNet:
    """The ResNet-32 whose weights lie in a folder."""
    network = ResNet(32)
    with np.load(data_dir / "resnet32-cifar10-weights.npz") as weights:
        state = {name: torch.from_numpy(weights[name]) for name in weights.files}
    missing, unexpected = network.load_state_dict(state, strict=False)
    lost = [name for name in missing if not name.endswith("num_batches_tracked")]
    if lost or unexpected:
        raise click.ClickException(f"the weights don't fit: {lost} are missing, {unexpected} extra")
    network.eval()
    return network


def pixels(images: np.ndarray) -> np.ndarray:
    """(n, 32, 32, 3) bytes to (n, 3, 32, 32) float32 in 0..1."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32) / np.float32(255)


@click.command()
@click.option("--data-dir", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the files.")
def main(data_dir: Path, out: Path) -> None:
    """Export the trained network and its data."""
    out.mkdir(parents=True, exist_ok=True)
    network = load_trained(data_dir)
    with np.load(data_dir / "cifar10-exact-subset.npz") as subset:
        order = np.random.default_rng(0).permutation(len(subset["train_x"]))
        chosen = pixels(subset["train_x"][np.sort(order[:CALIBRATION_IMAGES])])
        test, labels = pixels(subset["test_x"]), subset["test_y"].astype(np.int64)
    difference = export_onnx(network, torch.from_numpy(test[:16]), out / "resnet32.onnx")
    np.savez(out / "calibration.npz", image=chosen)
    np.savez(out / "test.npz", image=test, label=labels)
    with torch.no_grad():
        right = (network(torch.from_numpy(test)).argmax(1).numpy() == labels).mean()
    click.echo(f"exported to {difference:.1e}; top-1 {right:.2%} on {len(labels)} test images")


if __name__ == "__main__":
    main()
