"""Small training runs, and whether two states are the same to the bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

torch = pytest.importorskip("torch")

from models.reference import train, training  # noqa: E402
from models.reference.datasets import pixels  # noqa: E402
from tests.support.torch_exports import share_operators  # noqa: E402

WIDTHS = {"mlp": 16, "cnn": 4, "vgg": 4, "lenet": 3}

share_operators()


def run(command: Any, *arguments: object) -> Result:
    """The outcome of a command; an exception other than its exit is raised again."""
    result = CliRunner().invoke(command, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def train_lenet(folder: Path, checkpoint: Path, *more: object, epochs: int = 3) -> Result:
    return run(
        train.main,
        *("lenet", "--data", "fashion", "--data-dir", folder, "--width", 3, "--threads", 1),
        *("--epochs", epochs, "--batch-size", 16, "--checkpoint", checkpoint, *more),
    )


def state(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, but for the time that it took."""
    entries: dict[str, Any] = torch.load(path, weights_only=True)
    assert entries.pop("seconds") >= 0
    return entries


def equal(a: object, b: object) -> bool:
    """Whether two states are the same to the bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(equal, a, b))
    return a == b


def interrupt_at(monkeypatch: pytest.MonkeyPatch, call: int, what: Callable[[Any], Any]) -> None:
    """Have `what` happen to the images of one step or look."""
    calls = iter(range(1, 1000))

    def spoiled(image: Any) -> Any:
        return what(pixels(image)) if next(calls) == call else pixels(image)

    monkeypatch.setattr(training, "pixels", spoiled)
