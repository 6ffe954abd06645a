"""The train command: runs that are killed, stopped, resumed, refused, and end the same."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.data_folders import write_idx

torch = pytest.importorskip("torch")

from models.reference import export, train, training  # noqa: E402
from tests.models.training_runs import equal, interrupt_at, run, state, train_lenet  # noqa: E402

ROOT = Path(__file__).parent.parent.parent

KILLER = """
import os, signal, sys
from models.reference import train, training
real, calls = training.pixels, [0]
def pixels(image):
    calls[0] += 1
    if calls[0] == 6:  # three steps and a look at the test images are an epoch: the second step
        os.kill(os.getpid(), signal.SIGKILL)
    return real(image)
training.pixels = pixels
train.main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_to_the_same_file(tmp_path: Path) -> None:
    write_idx(tmp_path)
    whole, cut = tmp_path / "whole.pt", tmp_path / "cut.pt"
    assert train_lenet(tmp_path, whole).exit_code == 0
    command = ["lenet", "--data", "fashion", "--data-dir", str(tmp_path), "--width", "3"]
    command += ["--epochs", "3", "--batch-size", "16", "--checkpoint", str(cut), "--threads", "1"]
    killed = subprocess.run(
        [sys.executable, "-c", KILLER, *command], cwd=ROOT, capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert state(cut)["epoch"] == 1
    done = train_lenet(tmp_path, cut)
    assert done.exit_code == 0
    assert "cut.pt: 1 epochs done" in done.output
    assert "epoch 2/3" in done.output
    assert "epoch 1/3" not in done.output
    assert equal(state(cut), state(whole))
    # What the user sees of the exporter is the line of the command.
    made = [tmp_path / "cut.onnx", tmp_path / "whole.onnx"]
    assert run(export.main, whole, made[1]).exit_code == 0
    done_export = subprocess.run(
        [sys.executable, "-m", "models.reference.export", cut, made[0]],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done_export.stderr == ""
    assert len(done_export.stdout.splitlines()) == 1
    assert made[0].read_bytes() == made[1].read_bytes()


@pytest.fixture
def heeded() -> Iterator[None]:
    """Handles SIGINT as in a terminal: a shell has it ignored in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeded")
def test_ctrl_c_ends_with_130_and_goes_on_to_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_idx(tmp_path)
    whole, cut = tmp_path / "whole.pt", tmp_path / "cut.pt"
    assert train_lenet(tmp_path, whole).exit_code == 0

    def interrupted(image: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return image

    with monkeypatch.context() as patched:
        interrupt_at(patched, 7, interrupted)
        stopped = train_lenet(tmp_path, cut)
    assert stopped.exit_code == 130
    assert f"stopped; the same command goes on from {cut}" in stopped.output
    assert state(cut)["epoch"] == 1
    assert train_lenet(tmp_path, cut).exit_code == 0
    assert equal(state(cut), state(whole))


@pytest.mark.usefixtures("heeded")
def test_ctrl_c_while_data_is_read_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "load", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    stopped = train_lenet(tmp_path, tmp_path / "run.pt")
    assert stopped.exit_code == 130
    assert not (tmp_path / "run.pt").exists()


def test_more_epochs_go_on_from_a_finished_run(tmp_path: Path) -> None:
    write_idx(tmp_path)
    path = tmp_path / "run.pt"
    assert train_lenet(tmp_path, path, epochs=1).exit_code == 0
    done = train_lenet(tmp_path, path, epochs=2)
    assert "epoch 2/2" in done.output
    assert state(path)["epoch"] == 2


def test_a_loss_that_is_no_number_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_idx(tmp_path)
    path, before = tmp_path / "run.pt", tmp_path / "before.pt"
    assert train_lenet(tmp_path, before, epochs=1).exit_code == 0
    path.write_bytes(before.read_bytes())
    interrupt_at(monkeypatch, 2, lambda image: image * np.inf)
    done = train_lenet(tmp_path, path)
    assert done.exit_code == 1
    assert path.read_bytes() == before.read_bytes()
    (line,) = [x for x in done.output.splitlines() if x.startswith("Error")]
    assert line == done.output.splitlines()[-1]
    assert "epoch 2, step 2: the loss is nan at a learning rate of 0.000" in line
    assert "(--lr 0.001); start again with a lower --lr, such as 0.0001" in line
    assert "the last one is kept" in line


@pytest.mark.parametrize("rate", ["0", "-1", "1e39", "inf", "fast"])
def test_a_learning_rate_that_makes_no_sense_is_one_clear_line(tmp_path: Path, rate: str) -> None:
    done = train_lenet(tmp_path, tmp_path / "run.pt", "--lr", rate)
    assert done.exit_code == 2
    assert "'--lr'" in done.output.splitlines()[-1]


def test_a_twisted_run_ends_at_its_rank_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_idx(tmp_path)
    whole, cut = tmp_path / "whole.pt", tmp_path / "cut.pt"
    settings = ("--twist", "svd", "--rank", "4", "--every", 2)
    assert train_lenet(tmp_path, whole, *settings).exit_code == 0
    weights = state(whole)["network"]
    # Three epochs of three steps: the last distortion is that of the end, not of a step.
    assert [int(torch.linalg.matrix_rank(weights[f"fc{i}.weight"], rtol=1e-5)) for i in (1, 2)] == [
        4,
        4,
    ]
    assert state(whole)["twist"]["steps"] == 9
    with monkeypatch.context() as patched:
        interrupt_at(patched, 7, lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        assert train_lenet(tmp_path, cut, *settings).exit_code == 130
    assert state(cut)["twist"]["steps"] == 3
    assert train_lenet(tmp_path, cut, *settings).exit_code == 0
    assert equal(state(cut), state(whole))


_TWIST = ("--twist", "svd", "--rank", "4", "--every", 4)


@pytest.mark.parametrize("twist", [(), _TWIST, (*_TWIST, "--metric", "data")])
def test_a_run_stopped_in_the_middle_of_an_epoch_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, twist: tuple[object, ...]
) -> None:
    write_idx(tmp_path)
    whole, cut = tmp_path / "whole.pt", tmp_path / "cut.pt"
    settings = (*twist, "--schedule", "steps", "--lr", 0.01)
    assert train_lenet(tmp_path, whole, *settings).exit_code == 0
    with monkeypatch.context() as patched:
        patched.setattr(training, "_CHECKPOINT_SECONDS", 0.0)
        # An epoch is three steps and a look at the test images: this is the third of the second.
        interrupt_at(patched, 7, lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        assert train_lenet(tmp_path, cut, *settings).exit_code == 130
    half = state(cut)
    assert (half["epoch"], half["step"]) == (1, 2)
    assert half["loss"] > 0
    assert half["order"].sort().values.tolist() == list(range(len(half["order"])))
    assert half["twist"] is None if not twist else half["twist"]["steps"] == 5
    done = train_lenet(tmp_path, cut, *settings)
    assert "cut.pt: 1 epochs and 2 steps done" in done.output
    assert equal(state(cut), state(whole))
    assert not equal(half["network"], state(whole)["network"])


@pytest.mark.parametrize("call", [3, 7, 8, 10])
def test_a_run_that_hands_over_to_factors_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    write_idx(tmp_path)
    whole, cut = tmp_path / "whole.pt", tmp_path / "cut.pt"
    settings = (*_TWIST, "--factors", 0.5)  # of nine steps the last four
    assert train_lenet(tmp_path, whole, *settings).exit_code == 0
    end = state(whole)
    assert end["factorized"]
    assert end["twist"]["steps"] == 5
    assert end["network"]["fc1.0.weight"].shape[0] == end["network"]["fc1.1.weight"].shape[1] == 4
    with monkeypatch.context() as patched:
        patched.setattr(training, "_CHECKPOINT_SECONDS", 0.0)
        interrupt_at(patched, call, lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        assert train_lenet(tmp_path, cut, *settings).exit_code == 130
    assert state(cut)["factorized"] == (call > 7)
    assert train_lenet(tmp_path, cut, *settings).exit_code == 0
    assert equal(state(cut), state(whole))


def test_weights_that_are_lost_between_two_checkpoints_are_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_idx(tmp_path)
    monkeypatch.setattr(training, "_CHECKPOINT_SECONDS", 0.0)
    path, backward = tmp_path / "run.pt", torch.autograd.backward

    def spoiled(loss: Any) -> None:
        backward(loss * np.nan)

    monkeypatch.setattr(torch.autograd, "backward", spoiled)
    done = train_lenet(tmp_path, path)
    assert done.exit_code == 1
    assert "epoch 1, step 1: conv1.weight is no longer finite" in done.output.splitlines()[-1]
    assert (state(path)["epoch"], state(path)["step"]) == (0, 0)
    assert all(bool(w.isfinite().all()) for w in state(path)["network"].values())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("--twist", "nonsense"), "nonsense"),
        (("--twist", "svd", "--rank", "many"), "many"),
        (("--rank", "3"), "name a method with --twist"),
        (("--every", 3), "name a method with --twist"),
        (("--metric", "data"), "name a method with --twist"),
        (("--factors", 0.1), "name a method with --twist"),
        (("--twist", "expand-at-load", "--metric", "data"), "can't be fitted to inputs; exclude"),
    ],
)
def test_a_twist_that_makes_no_sense_is_one_clear_line(
    tmp_path: Path, settings: tuple[object, ...], words: str
) -> None:
    write_idx(tmp_path)
    done = train_lenet(tmp_path, tmp_path / "run.pt", *settings)
    assert done.exit_code == 2
    assert words in done.output.splitlines()[-1]
    assert not (tmp_path / "run.pt").exists()


def test_a_device_that_is_not_there_is_one_clear_line(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    write_idx(tmp_path)
    done = train_lenet(tmp_path, tmp_path / "a.pt", "--device", "cuda")
    assert done.exit_code == 2
    assert "Error: --device cuda: PyTorch sees no CUDA device" in done.output
    assert not (tmp_path / "a.pt").exists()
