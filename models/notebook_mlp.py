"""The seed's MLP, factorized to the sizes of plain truncation without retraining.

``python -m models.notebook_mlp --data-dir DIR --out FOLDER`` trains 784-1024x5-10 on MNIST
(``mnist-60k.npz`` of the folder, split 50,000 / 10,000) and on Fashion-MNIST. Then it sets plain
truncated SVD, every layer at rank D, beside onnxlr at that number of parameters, fitted to training
images whose labels nothing reads. Accuracy is over the 10,000 images that are held out. A second
run finds the trained models and only measures.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch

import onnxlr
from models.checkpoint import Recipe
from models.train import Data, pixels
from onnxlr.model import count_params, load

RECIPE = Recipe("mlp", width=1024, batch_size=128, lr=1e-3, seed=0)
EPOCHS = 15
RANKS = (10, 20, 30, 50)
_CALIBRATION = 2048  # training images that factors are fitted to; the same number judges them
_BATCH = 1000


@dataclass(frozen=True)
class Case:
    """A data set, and what the table demands of its smallest models."""

    title: str
    train: Data
    test: Data
    goals: tuple[str, ...]


def load_mnist(data_dir: Path) -> tuple[Data, Data]:
    """50,000 images to train on and 10,000 to test on, by a seeded draw."""
    with np.load(data_dir / "mnist-60k.npz") as file:
        image, label = torch.tensor(file["x"]).unsqueeze(1), torch.tensor(file["y"]).long()
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(label)))
    train, test = order[:50_000], order[50_000:]
    return Data(image[train], label[train]), Data(image[test], label[test])


def accuracy(model: onnx.ModelProto, data: Data) -> float:
    """Fraction of the images whose largest logit is at their label, in ONNX Runtime."""
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    hits = 0
    for image, label in zip(data.image.split(_BATCH), data.label.split(_BATCH), strict=True):
        (logits,) = session.run(["logits"], {"image": pixels(image).numpy()})
        hits += int((logits.argmax(1) == label.numpy()).sum())
    return hits / len(data.label)


def write_samples(train: Data, folder: Path) -> tuple[Path, Path]:
    """Training images to fit to, and others to judge on; neither file has labels."""
    order = torch.from_numpy(np.random.default_rng(1).permutation(len(train.label)))
    paths = folder / "calibration.npz", folder / "validation.npz"
    for path, chosen in zip(paths, order.split(_CALIBRATION), strict=False):
        np.savez(path, image=pixels(train.image[chosen]).numpy())
    return paths


def measure(case: Case, path: Path, rank: int, folder: Path) -> str:
    """A row of the table."""
    plain = onnxlr.optimize(path, method="svd", rank=rank, verify="none").model
    size, whole = count_params(load(plain).model), count_params(load(path).model)
    calibration, validation = write_samples(case.train, folder)
    # The budget is what the plain one has, to the parameter; which layer gets how much is open.
    ours = onnxlr.optimize(
        path,
        folder / f"{path.stem}-{rank}.onnx",
        data=calibration,
        validation=validation,
        target=f"params={size / whole!r}",
        max_drop=1,
    )
    ranks = [layer.rank or "full" for layer in ours.plan.decisions]
    print(ranks)
    return (
        f"| {case.title} | {rank} | {size:,} | {accuracy(plain, case.test):.2%} | "
        f"{accuracy(ours.model, case.test):.2%} |"
    )
