"""Checkpoints: damaged, foreign and unwritable ones, other recipes, weights to begin with."""

from pathlib import Path

import numpy as np
import pytest

from tests.support.data_folders import write_idx

torch = pytest.importorskip("torch")

from models.reference import export  # noqa: E402
from models.reference.datasets import DATASETS  # noqa: E402
from models.reference.files import FileError, replace_file  # noqa: E402
from models.reference.networks import NETWORKS  # noqa: E402
from tests.models.training_runs import equal, run, state, train_lenet  # noqa: E402


def test_another_recipe_is_refused_with_what_changed(tmp_path: Path) -> None:
    write_idx(tmp_path)
    path = tmp_path / "run.pt"
    assert train_lenet(tmp_path, path, epochs=1).exit_code == 0
    done = train_lenet(tmp_path, path, "--seed", 1, "--lr", 0.5, "--twist", "svd")
    assert done.exit_code == 1
    assert (
        "made with lr 0.001 (now 0.5), seed 0 (now 1), twist none (now svd 0.25 200 weight); use"
        in (done.output)
    )


@pytest.mark.parametrize("keep", [0, 20, 0.5, -1])
def test_a_damaged_checkpoint_is_one_clear_line(tmp_path: Path, keep: float) -> None:
    write_idx(tmp_path)
    path = tmp_path / "run.pt"
    assert train_lenet(tmp_path, path, epochs=1).exit_code == 0
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if 0 < keep < 1 else int(keep)])
    for done in (train_lenet(tmp_path, path), run(export.main, path, tmp_path / "out.onnx")):
        assert done.exit_code == 1
        (line,) = done.output.splitlines()
        assert f"{path} can't be read as a checkpoint" in line
        assert "delete it" in line


@pytest.mark.parametrize(
    "content", [[1, 2], {"recipe": {}}, {"recipe": {"twist": None, "seed": 0}}, torch.zeros(3)]
)
def test_a_foreign_checkpoint_is_one_clear_line(tmp_path: Path, content: object) -> None:
    path = tmp_path / "other.pt"
    torch.save(content, path)
    done = run(export.main, path, tmp_path / "out.onnx")
    assert done.exit_code == 1
    assert "can't be read as a checkpoint" in done.output


def test_a_checkpoint_that_cannot_be_written_shows_before_an_epoch(tmp_path: Path) -> None:
    write_idx(tmp_path)
    (tmp_path / "file").write_text("")
    done = train_lenet(tmp_path, tmp_path / "file" / "run.pt")
    assert done.exit_code == 1
    assert len(done.output.splitlines()) == 1
    assert "run.pt can't be written (" in done.output


def test_a_file_is_never_half_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    whole = Path.write_bytes

    def interrupted(self: Path, content: bytes) -> None:
        whole(self, content[:2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace_file(path, b"new one")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_replacing_a_file_fails_whole(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(FileError, match="taken can't be written"):
        replace_file(tmp_path / "taken", b"new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["taken"]


def test_a_run_begins_with_the_weights_it_is_given(tmp_path: Path) -> None:
    write_idx(tmp_path)
    first, arrays = tmp_path / "first.pt", tmp_path / "weights.npz"
    assert train_lenet(tmp_path, first, epochs=1).exit_code == 0
    weights = state(first)["network"]
    np.savez(arrays, **{name: weight.numpy() for name, weight in weights.items()})
    ends = []
    for number, init in enumerate((first, arrays)):
        path = tmp_path / f"second{number}.pt"
        # So small a rate that the weights stay where they began, but for rounding.
        done = train_lenet(tmp_path, path, "--init", init, "--lr", 1e-12, epochs=1)
        assert done.exit_code == 0, done.output
        ends.append(state(path)["network"])
        assert all(torch.allclose(ends[-1][n], w, rtol=0, atol=1e-8) for n, w in weights.items())
    assert equal(*ends)
    other = train_lenet(tmp_path, tmp_path / "second0.pt", "--lr", 1e-12, epochs=1)
    assert other.exit_code == 1
    assert "(now none)" in other.output


def test_weights_that_do_not_fit_are_one_clear_line(tmp_path: Path) -> None:
    write_idx(tmp_path)
    network = NETWORKS["lenet"].build(DATASETS["fashion"], 3)
    arrays = {name: weight.numpy() for name, weight in network.state_dict().items()}
    arrays["conv1.weight"] = arrays["conv1.weight"][:, :, 1:]
    arrays["conv9.weight"] = arrays.pop("conv2.weight")
    np.savez(tmp_path / "w.npz", **arrays)
    done = train_lenet(tmp_path, tmp_path / "run.pt", "--init", tmp_path / "w.npz")
    assert done.exit_code == 1
    (line,) = done.output.splitlines()
    for words in (
        "conv2.weight is missing",
        "conv9.weight is of another network",
        "conv1.weight has shape (3, 1, 4, 5), not (3, 1, 5, 5)",
    ):
        assert words in line
    assert not (tmp_path / "run.pt").exists()
