"""A small network for onnxlr.training: its task, a few steps on it, and its export."""

import copy
import logging
import warnings
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402
from torch.optim import Optimizer  # noqa: E402

from onnxlr.training import DeepTwist  # noqa: E402
from tests.support.torch_exports import share_operators  # noqa: E402

share_operators()


class Net(nn.Module):
    """A normalized stem, two more convolutions, two linear layers."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1, bias=not norm)
        self.norm = nn.BatchNorm2d(24) if norm else nn.Identity()
        self.mid = nn.Conv2d(24, 32, 3, stride=2, padding=1, bias=not norm)
        self.again = nn.BatchNorm2d(32) if norm else nn.Identity()
        self.last = nn.Conv2d(32, 24, 3, padding=1)
        self.hidden = nn.Linear(96, 48)
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))  # (N, 3, 12, 12) -> (N, 24, 12, 12)
        x = torch.relu(self.again(self.mid(x)))  # -> (N, 32, 6, 6)
        x = torch.relu(self.last(x))  # -> (N, 24, 6, 6)
        x = nn.functional.avg_pool2d(x, 3).flatten(1)  # -> (N, 96)
        logits: Tensor = self.head(torch.relu(self.hidden(x)))  # -> (N, 10)
        return logits


def export(model: nn.Module, x: Tensor) -> onnx.ModelProto:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about itself
        program = torch.onnx.export(
            copy.deepcopy(model).eval(),
            (x,),
            dynamo=True,
            input_names=["x"],
            output_names=["y"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    proto: onnx.ModelProto = program.model_proto
    return proto


def traced(model: nn.Module, x: Tensor) -> Any:
    """What torch makes an export of, in a fourth of the time: the operators, and the weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about itself
        batch = torch.export.Dim("batch")
        inference = copy.deepcopy(model).eval()
        return torch.export.export(inference, (x,), dynamic_shapes=({0: batch},))


def exported(traced: Any) -> onnx.ModelProto:
    """The export of what was traced."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            traced, dynamo=True, input_names=["x"], output_names=["y"], verbose=False
        )
    proto: onnx.ModelProto = program.model_proto
    return proto


def run(model: onnx.ModelProto, x: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x.numpy()})[0])


def train(
    model: nn.Module, twist: DeepTwist | None, steps: int, images: Tensor, labels: Tensor
) -> Optimizer:
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    model.train()
    for step in range(steps):
        some = slice(16 * step % len(images), 16 * step % len(images) + 16)
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(model(images[some]), labels[some]))
        optimizer.step()
        if twist is not None:
            twist.step()
    return optimizer


def task(count: int = 128) -> tuple[Tensor, Tensor]:
    """Noise around a pattern a class: learnt in a few steps."""
    generator = torch.Generator().manual_seed(1)
    patterns = torch.randn(10, 3, 12, 12, generator=generator)
    labels = torch.randint(10, (count,), generator=generator)
    return patterns[labels] + 0.5 * torch.randn(count, 3, 12, 12, generator=generator), labels
