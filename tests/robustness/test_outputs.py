"""What is written never takes the place of what is read, or of what others may need."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner

import onnxlr
from onnxlr.cli.commands import main
from onnxlr.system.cache import Cache, key_of, open_cache
from onnxlr.system.files import scratch_folder, staged_texts, workspace
from tests.support import commands
from tests.support.limits import SHORT, code_of
from tests.support.networks import images, network


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with its weights in a file beside it, and samples, alone and in a folder."""
    monkeypatch.chdir(tmp_path)
    save("in.onnx", "in.data")
    Path("samples").mkdir()
    for path in ("d.npz", "samples/d.npz"):
        np.savez(path, x=images(32, 0))
    Path("links").mkdir()
    Path("links/d.npz").symlink_to("../d.npz")
    Path("way").symlink_to(".")
    Path("round.json").symlink_to("round.json")
    return tmp_path


def save(path: str, data: str, seed: int = 0) -> None:
    onnx.save(
        network(seed=seed), path, save_as_external_data=True, location=data, size_threshold=64
    )


def held() -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in Path().rglob("*") if p.is_file()}


QUICK = "optimize in.onnx out.onnx --rank 4 --verify none"
FITTED = (
    "optimize in.onnx out.onnx --rank 4 --max-drop 1 --no-measure --data d.npz "
    "--metric rel-error --plan-out plan.json"
)


@pytest.mark.parametrize(
    ("before", "command", "words"),
    [
        ("", f"{QUICK} --plan-out in.data", "in.data is the same file as the input"),
        ("", f"{QUICK} --report in.data", "in.data is the same file as the input"),
        ("", f"{QUICK} --json in.data", "in.data is the same file as the input"),
        ("", "inspect in.onnx --json in.data", "in.data is the same file as the input"),
        ("", "compare in.onnx in.onnx --json in.data", "in.data is the same file as the input"),
        ("", "bench in.onnx --json in.data", "in.data is the same file as the input"),
        ("", "optimize in.onnx samples/d.npz --data samples", "one of the samples in samples"),
        (FITTED, "apply plan.json in.onnx d.npz --data d.npz", "same file as the input d.npz"),
        (FITTED, "apply plan.json in.onnx d.npz", "same file as the input d.npz"),
        (
            "",
            "optimize in.onnx samples/in.data --rank 4",
            "has a name that the external data of",
        ),
        ("", "optimize in.onnx - --rank 4", "- prints, which only --json does"),
        ("", f"{QUICK} --plan-out -", "- prints, which only --json does"),
        ("", f"{QUICK} --report -", "- prints, which only --json does"),
        ("", f"{QUICK} --dask foo", "'foo' is no address"),
        ("", f"{QUICK} --dask tcp://", "'tcp://' is no address"),
        ("", "optimize in.onnx d.npz --data links", "one of the samples in links"),
        ("", f"{QUICK} --data links --report d.npz", "one of the samples in links"),
        ("", f"{QUICK} --report way/out.onnx", "named for two outputs"),
        ("", f"{QUICK} --report OUT.onnx", "named for two outputs"),
        ("", f"{QUICK} --latency-table d.npz --json d.npz", "d.npz is named for two outputs"),
        (
            "",
            "optimize in.onnx t.json --latency-table t.json --rank 4",
            "t.json is named for two outputs",
        ),
    ],
)
@pytest.mark.usefixtures("here")
def test_an_output_is_none_of_the_inputs(before: str, command: str, words: str) -> None:
    if before:
        assert CliRunner().invoke(main, before.split()).exit_code == 0
    files = held()
    result = CliRunner().invoke(main, command.split())
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert held() == files


@pytest.mark.parametrize("name", ["in.data", f"weights-{'0' * 16}.data"])
@pytest.mark.parametrize("flag", ["--json", "--report", "--plan-out", "--latency-table"])
@pytest.mark.usefixtures("here")
def test_no_report_takes_the_place_of_the_weights(flag: str, name: str) -> None:
    Path("other").mkdir()
    command = f"optimize in.onnx other/out.onnx --max-drop 0 --no-measure {flag} other/{name}"
    result = CliRunner().invoke(main, command.split())
    assert result.exit_code == 2, result.output
    assert f"other/{name} has a name that the external data" in result.stderr
    assert not list(Path("other").iterdir())


@pytest.mark.usefixtures("here")
def test_a_link_to_itself_is_replaced() -> None:
    for flag in ("--json", "--plan-out", "--report"):
        assert CliRunner().invoke(main, f"{QUICK} {flag} round.json".split()).exit_code == 0
        assert Path("round.json").is_file()
        Path("round.json").unlink()
        Path("round.json").symlink_to("round.json")


@pytest.mark.usefixtures("here")
def test_the_data_of_a_former_out_stay_for_whoever_has_them_too() -> None:
    onnxlr.optimize("in.onnx", "out.onnx", rank="0.25", verify="none")
    (old,) = Path().glob("weights-*.data")
    Path("weights-copy.onnx").write_bytes(Path("out.onnx").read_bytes())
    result = onnxlr.optimize("in.onnx", "out.onnx", rank="0.5", verify="none")
    assert old.exists()
    assert [n for n in result.report.notes if old.name in n and "still there" in n]
    for path in ("out.onnx", "weights-copy.onnx"):
        onnx.checker.check_model(path)


@pytest.mark.parametrize("link", [Path.hardlink_to, Path.symlink_to])
@pytest.mark.usefixtures("here")
def test_a_link_to_the_weights_makes_room_for_them(link: Callable[[Path, Path], None]) -> None:
    """Snapshots make links in place of copies, which runtimes refuse as external data."""
    Path("other").mkdir()
    link(Path("other/in.data"), Path("in.data").absolute())
    if link is Path.hardlink_to:  # the one of IN must have a single name
        save("again.onnx", "again.data")
        Path("in.data").unlink()
        Path("in.data").write_bytes(Path("again.data").read_bytes())
    before = Path("in.data").read_bytes()
    onnxlr.optimize("in.onnx", "other/out.onnx", max_drop=0, measure=False)
    onnx.checker.check_model("other/out.onnx")
    onnxlr.inspect("other/out.onnx")
    onnxruntime.InferenceSession("other/out.onnx", providers=["CPUExecutionProvider"])
    assert Path("in.data").read_bytes() == before
    assert not Path("other/in.data").is_symlink()


@pytest.mark.usefixtures("here")
def test_a_folder_of_weights_that_leads_elsewhere() -> None:
    Path("deep/sub").mkdir(parents=True)
    Path("other").mkdir()
    save("deep/in.onnx", "sub/w.data")
    Path("other/sub").symlink_to("../deep/sub")
    before = held()
    with pytest.raises(onnxlr.OutputError, match="leads out of OUT's folder"):
        onnxlr.optimize("deep/in.onnx", "other/out.onnx", max_drop=0, measure=False)
    assert held() == before


def test_a_folder_that_lets_nothing_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a folder became append-only or read-only, scratch files stay without a message."""

    def refuse(path: str, **_: object) -> None:
        raise PermissionError(1, "Operation not permitted", path)

    with scratch_folder(tmp_path, "work-") as folder:
        (folder / "file").touch()
        for name in ("unlink", "rmdir"):
            monkeypatch.setattr(os, name, refuse)
    monkeypatch.undo()
    assert folder.exists()


@pytest.mark.parametrize("dangling", [False, True])
@pytest.mark.usefixtures("here")
def test_another_file_of_the_weights_name_stays(dangling: bool) -> None:
    Path("other").mkdir()
    if dangling:
        Path("other/in.data").symlink_to("nowhere")
    else:
        Path("other/in.data").write_text("a file of somebody's")
    before = held()
    with pytest.raises(onnxlr.OutputError, match="another file of that name is there"):
        onnxlr.optimize("in.onnx", "other/out.onnx", max_drop=0, measure=False)
    assert held() == before
    assert Path("other/in.data").is_symlink() == dangling


@pytest.mark.usefixtures("here")
def test_a_pipe_beside_out_is_never_opened() -> None:
    os.mkfifo("pipe")
    for rank in ("0.25", "0.5"):
        onnxlr.optimize("in.onnx", "out.onnx", rank=rank, verify="none")
    onnx.checker.check_model("out.onnx")


def test_the_cache_makes_room_among_its_entries_only(tmp_path: Path) -> None:
    foreign = tmp_path / "data.npz"
    np.savez(foreign, x=np.ones(10_000))
    os.utime(foreign, (1, 1))
    for i in range(3):
        Cache(tmp_path, 20_000).write_arrays("factors", key_of(i), {"x": np.ones(1000)})
    assert foreign.exists()
    assert len(list(tmp_path.glob("factors-*.npz"))) == 2


METRICS = """
import json
import os
import subprocess
import sys
def moved(session):
    os.chdir("/")
    return 1.0
def gone(session):
    raise GeneratorExit("enough")
def loud(session):
    print("a word")
    return 1.0
"""


@pytest.mark.usefixtures("here")
def test_what_a_metric_does_besides(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("odd_metrics.py").write_text(METRICS)
    monkeypatch.syspath_prepend(".")
    quick = "optimize in.onnx out.onnx --rank 4 --max-drop 1 --no-measure --json - --metric"
    result = CliRunner().invoke(main, f"{quick} odd_metrics:moved".split())
    assert result.exit_code == 0, result.stderr
    assert not list(Path().glob(".onnxlr-*"))
    result = CliRunner().invoke(main, f"{quick} odd_metrics:loud".split())
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["metric"]["name"] == "odd_metrics:loud"
    result = CliRunner().invoke(main, f"{quick} odd_metrics:gone".split())
    assert result.exit_code == 1
    assert "the metric odd_metrics:gone failed: GeneratorExit: enough" in result.stderr


TOOL = f"{sys.executable} -m onnxlr"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
@pytest.mark.usefixtures("here")
def test_streams_that_are_closed(closed: str) -> None:
    whole = QUICK.replace("--verify none", "--max-drop 1 --no-measure --include fc")
    command = f"{TOOL} {whole} {closed}"
    assert subprocess.run(command, shell=True, check=False).returncode == 0
    onnx.checker.check_model("out.onnx")


@pytest.mark.usefixtures("here")
def test_modules_in_the_working_folder_are_none_of_ours() -> None:
    """Files beside a model may be named as modules of the standard library or of packages."""
    for name in ("random", "queue", "select", "platform", "types", "string", "joblib", "numpy"):
        Path(f"{name}.py").write_text(f"open({str(Path('ran').absolute())!r}, 'a')\nraise OSError")
    options = (
        "optimize in.onnx out.onnx --data d.npz --max-drop 1 --metric rel-error "
        "--target macs=0.5 --no-measure --jobs 2 --quiet"
    )
    code = f"from onnxlr.__main__ import main; {code_of(SHORT)}; main()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *options.split()],
        check=False,
        capture_output=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("ONNXLR_")},
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert not Path("ran").exists()


@pytest.mark.usefixtures("here")
def test_a_stream_that_lacks_letters() -> None:
    done = subprocess.run(
        f"{TOOL} {QUICK}",
        shell=True,
        check=False,
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0, done.stderr
    assert b"?" in done.stdout


@pytest.mark.usefixtures("here")
def test_a_link_to_an_open_file_is_not_replaced() -> None:
    Path("stdout").symlink_to("/proc/self/fd/1")
    with Path("printed").open("w") as printed:
        result = commands.run(*QUICK.split(), "--json", "stdout", prints_to=printed.fileno())
    assert result.returncode == 2
    assert "a link to an open file" in result.stderr
    assert Path("stdout").is_symlink()


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("seed", -1),
        ("sequential", -5),
        ("sequential", "x"),
        ("sequential", 2.5),
        ("data", "x" * 5000 + ".npz"),
    ],
)
@pytest.mark.usefixtures("here")
def test_plans_that_were_edited(part: str, value: object) -> None:
    assert CliRunner().invoke(main, FITTED.split()).exit_code == 0
    plan = json.loads(Path("plan.json").read_text())
    (plan if part == "seed" else plan["calibration"])[part] = value
    Path("plan.json").write_text(json.dumps(plan))
    result = CliRunner().invoke(main, ["apply", "plan.json", "in.onnx", "again.onnx"])
    assert result.exit_code == 2, result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("rank", "ms"),
    [("9" * 30, 1.0), ("9" * 5000, 1.0), ("4", 10**400), ("4", 1e308)],
)
@pytest.mark.usefixtures("here")
def test_tables_of_absurd_numbers(rank: str, ms: float) -> None:
    table = {"machine": {}, "unit": "ms", "times": {"use": {"svd": {rank: [1.0, ms, 1.0]}}}}
    Path("table.json").write_text(json.dumps(table))
    command = "optimize in.onnx out.onnx --latency-table table.json --data d.npz"
    result = CliRunner().invoke(main, command.split())
    assert result.exit_code == 2
    assert "is no latency table" in result.stderr


SAVED_AGAIN = """
import os, pathlib
DATA = pathlib.Path("in.data")
def shorter(session):
    DATA.write_bytes(DATA.read_bytes()[:-64])
    return 1.0
def other(session):
    DATA.write_bytes(bytes(DATA.stat().st_size))
    return 1.0
def unpacked(session):
    about = DATA.stat()
    DATA.write_bytes(bytes(about.st_size))
    os.utime(DATA, ns=(about.st_atime_ns, about.st_mtime_ns))
    return 1.0
def others_model(session):
    pathlib.Path("in.onnx").write_bytes(pathlib.Path("other.onnx").read_bytes())
    return 1.0
def touched(session):
    os.utime(DATA)
    os.utime("in.onnx")
    return 1.0
"""


@pytest.mark.parametrize("metric", ["shorter", "other", "unpacked", "others_model", "touched"])
@pytest.mark.parametrize("rank", ["4", "1.0"])  # replaced, or left as it is and copied
@pytest.mark.usefixtures("here")
def test_a_model_that_is_saved_again_meanwhile(metric: str, rank: str) -> None:
    save("other.onnx", "other.data", seed=1)
    Path("saved_again.py").write_text(SAVED_AGAIN)
    command = f"optimize in.onnx out.onnx --rank {rank} --max-drop 1 --no-measure --data d.npz"
    done = commands.run(*command.split(), "--metric", f"saved_again:{metric}")
    if metric == "touched":
        assert done.returncode == 0, done.stderr
        onnx.checker.check_model("out.onnx")
        return
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "changed while they were being worked on" in done.stderr or metric == "shorter"
    assert not Path("out.onnx").exists()


def test_nobody_has_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(*_: object) -> str:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("ONNXLR_CACHE")
    monkeypatch.setattr("platformdirs.user_cache_dir", homeless)
    assert open_cache().path("latency", "k") is None


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("flag", ["--plan-out", "--report", "--json"])
def test_what_tells_of_the_model_can_not_be_written(
    flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model isn't written either: a command that fails leaves every file as it was."""
    Path("out.onnx").write_bytes(b"of an earlier run")
    Path("told").write_text("of an earlier run")
    before, unpatched = held(), Path.write_text

    def write(path: Path, text: str, **options: str) -> int:
        if ".onnxlr-run-" in str(path):
            unpatched(path, text[:100], **options)
            raise OSError(errno.ENOSPC, "No space left on device")
        return unpatched(path, text, **options)

    monkeypatch.setattr(Path, "write_text", write)
    done = CliRunner().invoke(main, [*QUICK.split(), "--quiet", flag, "told"])
    assert done.exit_code == 1
    assert done.stderr.startswith("onnxlr: told: the disk is full")
    assert done.stderr.count("\n") == 1
    assert held() == before


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", ["o.json", "o.textproto", "o", 250 * "x", "in.data.onnx"])
def test_the_format_goes_by_no_name(name: str) -> None:
    """A file meant for --json is taken for OUT where that was forgotten."""
    onnxlr.optimize("in.onnx", "plain.onnx", rank=4, verify="none")
    done = CliRunner().invoke(main, [*QUICK.replace("out.onnx", name).split(), "--quiet"])
    assert (done.exit_code, done.stderr) == (0, "")
    assert Path(name).read_bytes() == Path("plain.onnx").read_bytes()


def test_a_folder_of_somebody_else_s(tmp_path: Path) -> None:
    """Its name is like that of ours; what it holds is not."""
    for name, content in (("killed", b""), ("theirs", b"weights")):
        (tmp_path / f".onnxlr-run-{name}").mkdir()
        (tmp_path / f".onnxlr-run-{name}" / "owner").write_bytes(content)
    with workspace(tmp_path / "out.onnx"):
        assert sorted(p.name for p in tmp_path.glob("*-theirs")) == [".onnxlr-run-theirs"]
        assert not (tmp_path / ".onnxlr-run-killed").exists()


def test_drafts_of_a_killed_run_go_with_the_next(tmp_path: Path) -> None:
    (tmp_path / ".onnxlr-run-killed").mkdir()
    for name in ("owner", "draft"):
        (tmp_path / ".onnxlr-run-killed" / name).touch()
    with staged_texts({tmp_path / "plan.json": "{}"}):
        assert not (tmp_path / "plan.json").exists()
        (folder,) = tmp_path.glob(".onnxlr-run-*")
        assert folder.name != ".onnxlr-run-killed"
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.skipif(os.name == "nt", reason="there it leads into a folder")
@pytest.mark.usefixtures("here")
def test_a_backslash_in_the_name_of_weights() -> None:
    save("in.onnx", "in\\.data")
    onnxlr.optimize("in.onnx", "out.onnx", rank=4, verify="none")
    onnx.checker.check_model("out.onnx")


@pytest.mark.usefixtures("here")
def test_a_disk_without_permissions(monkeypatch: pytest.MonkeyPatch) -> None:
    """FAT has none, nor have some network file systems."""

    def chmod(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", chmod)
    onnxlr.optimize("in.onnx", "out.onnx", rank=4, verify="none")
    onnx.checker.check_model("out.onnx")


@pytest.mark.usefixtures("here")
@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
def test_weights_are_as_open_as_the_model() -> None:
    """The weights are there already, made under a stricter mask."""
    masks = [os.umask(0o077)]
    try:
        onnxlr.optimize("in.onnx", "first.onnx", rank=4, verify="none")
        os.umask(0o022)
        onnxlr.optimize("in.onnx", "out.onnx", rank=4, verify="none")
    finally:
        os.umask(masks[0])
    (weights,) = Path().glob("weights-*.data")
    assert (weights.stat().st_mode & 0o777, Path("out.onnx").stat().st_mode & 0o777) == (
        0o644,
        0o644,
    )


@pytest.mark.usefixtures("here")
def test_names_that_no_disk_takes() -> None:
    for long in (300 * "x", "x\0y"):
        with pytest.raises(onnxlr.OnnxlrError):
            onnxlr.apply(long, "in.onnx")
        with pytest.raises(onnxlr.OnnxlrError):
            onnxlr.optimize("in.onnx", rank=4, target="latency", latency_table=long)


@pytest.mark.usefixtures("here")
def test_numbers_of_numpy_s() -> None:
    """Scripts pass numbers of numpy's; plan and report are JSON all the same."""
    result = onnxlr.optimize(
        "in.onnx",
        rank=4,
        verify="none",
        seed=np.int64(3),  # type: ignore[arg-type]
        batch=np.int64(2),  # type: ignore[arg-type]
        threads=np.int64(1),  # type: ignore[arg-type]
    )
    assert json.loads(result.plan.to_json())["seed"] == 3
    assert json.loads(json.dumps(result.report.to_dict()))


@pytest.mark.usefixtures("here")
def test_a_name_that_the_runtime_takes_otherwise() -> None:
    with pytest.raises(onnxlr.UsageError, match=r"ends in \.ort"):
        onnxlr.optimize("in.onnx", "out.ort", rank=4)
    save("in.onnx", "model.onnx")
    onnxlr.optimize("in.onnx", "out.onnx", include="nothing")
    assert Path("out.onnx").read_bytes() == Path("in.onnx").read_bytes()
    onnx.checker.check_model("out.onnx")


@pytest.mark.usefixtures("here")
def test_every_report_is_written_and_the_model() -> None:
    told = {"plan_out": "p.json", "report": "r.html", "json": "r.json"}
    result = onnxlr.optimize("in.onnx", "out.onnx", rank=4, verify="none", **told)  # type: ignore[arg-type]
    assert Path("p.json").read_text() == result.plan.to_json()
    assert json.loads(Path("r.json").read_text())["layers"]
    assert "</html>" in Path("r.html").read_text()
    assert Path("out.onnx").exists()


@pytest.mark.usefixtures("here")
def test_the_report_is_not_the_model() -> None:
    with pytest.raises(onnxlr.UsageError, match="named for two outputs"):
        onnxlr.optimize("in.onnx", "out.onnx", rank=4, verify="none", report="out.onnx")
    assert not Path("out.onnx").exists()
