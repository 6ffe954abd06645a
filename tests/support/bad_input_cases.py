"""Commands that must be refused: what is wrong, the exit code, and the words of the one line."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from tests.support.builders import low_rank, make_model, node

Array = NDArray[Any]
Setup = Callable[[], None]

OPTIMIZE = "optimize in.onnx out.onnx"
APPLY = "apply plan.json in.onnx out.onnx"


def network(width: int = 32, classes: int = 8) -> onnx.ModelProto:
    """fc1 of rank 4, Relu, fc2 of full rank; x float32[n, width]."""
    rng = np.random.default_rng(1)
    return make_model(
        [
            node("MatMul", ["x", "w1"], "h", "fc1"),
            node("Relu", ["h"], "r", "relu"),
            node("MatMul", ["r", "w2"], "y", "fc2"),
        ],
        {"x": ["n", width]},
        ["y"],
        {
            "w1": low_rank(rng, width, width, 4),
            "w2": rng.standard_normal((width, classes)).astype(np.float32),
        },
    )


def save(model: onnx.ModelProto, name: str = "in.onnx") -> None:
    Path(name).write_bytes(model.SerializeToString())


def weight(name: str, array: Array) -> onnx.ModelProto:
    """The network with one weight exchanged."""
    model = network()
    for tensor in model.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))
    return model


def external(file: str = "in.data", *, cut: int = 0, **entries: str) -> Setup:
    """IN with w1 in external data; ``entries`` replace or remove (empty) what describes it."""

    def setup() -> None:
        model = network()
        tensor = model.graph.initializer[0]
        data = tensor.raw_data
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        described = {"location": file, "offset": "0", "length": str(len(data))} | entries
        for key, value in described.items():
            if value:
                tensor.external_data.add(key=key, value=value)
        save(model)
        if file == "in.data":
            Path(file).write_bytes(data[: len(data) - cut])

    return setup


def _changed(change: Callable[[onnx.ModelProto], object]) -> Setup:
    """IN after a change to the network."""

    def setup() -> None:
        model = network()
        change(model)
        save(model)

    return setup


def _bytes(change: Callable[[bytes], bytes], name: str = "in.onnx") -> Setup:
    """A file after a change to its bytes."""
    return lambda: _void(Path(name).write_bytes(change(Path(name).read_bytes())))


def _text(name: str, text: str) -> Setup:
    return lambda: _void(Path(name).write_text(text, encoding="utf-8"))


def _arrays(**arrays: Array) -> Setup:
    return lambda: np.savez("data.npz", **arrays)  # type: ignore[arg-type]


def _then(*setups: Setup) -> Setup:
    def setup() -> None:
        for each in setups:
            each()

    return setup


def _void(_: object) -> None:
    """Let an expression stand for a setup."""


def sample(*shape: int) -> Array:
    return np.random.default_rng(2).standard_normal(shape).astype(np.float32)


def _set_opset(version: int) -> Setup:
    return _changed(lambda m: setattr(m.opset_import[0], "version", version))


def _unknown_op(op: str, domain: str) -> Setup:
    def change(model: onnx.ModelProto) -> None:
        model.graph.node[1].op_type = op
        model.graph.node[1].domain = domain
        if domain:
            model.opset_import.add(domain=domain, version=1)

    return _changed(change)


def _without_input(index: int) -> Setup:
    """A node that lacks an input the operator can't do without."""
    return _changed(lambda m: m.graph.node[index].input.pop())


def _undefined_input(model: onnx.ModelProto) -> None:
    model.graph.node[2].input[1] = "nowhere"


def _cycle(model: onnx.ModelProto) -> None:
    model.graph.node.extend([node("Identity", ["a"], "b"), node("Identity", ["b"], "a")])
    model.graph.node[0].input[1] = "a"


def _two_inputs() -> None:
    save(
        make_model(
            [node("Add", ["x", "z"], "s"), node("MatMul", ["s", "w"], "y", "fc")],
            {"x": ["n", 32], "z": ["n", 32]},
            ["y"],
            {"w": low_rank(np.random.default_rng(1), 32, 32, 4)},
        )
    )
    np.save("data.npy", sample(6, 32))


def _no_inputs() -> None:
    value = onnx.numpy_helper.from_array(sample(3, 32))
    rng = np.random.default_rng(1)
    save(
        make_model(
            [node("Constant", [], "x", value=value), node("MatMul", ["x", "w"], "y", "fc")],
            {},
            ["y"],
            {"w": low_rank(rng, 32, 32, 4)},
        )
    )


def _plan(change: Callable[[dict[str, Any]], object]) -> Setup:
    def setup() -> None:
        plan = json.loads(Path("plan.json").read_text(encoding="utf-8"))
        change(plan)
        Path("plan.json").write_text(json.dumps(plan), encoding="utf-8")

    return setup


def _row(**fields: object) -> Setup:
    return _plan(lambda plan: plan["layers"][0].update(fields))


def _nothing() -> None:
    """Everything is as it should be: the command line is what is wrong."""


@dataclass(frozen=True)
class Case:
    """A command that must be refused, and the words that its one line must hold."""

    name: str
    setup: Setup
    command: str
    code: int
    words: tuple[str, ...]


def _case(name: str, setup: Setup, command: str, code: int, *words: str) -> Case:
    return Case(name, setup, command, code, words)


_DATA = f"{OPTIMIZE} --data data.npz"

MODELS = [
    _case("no-such-file", lambda: Path("in.onnx").unlink(), OPTIMIZE, 1, "in.onnx", "no such file"),
    _case("folder", _nothing, "optimize folder out.onnx", 1, "folder", ".onnx file in it"),
    _case("empty", _bytes(lambda _: b""), OPTIMIZE, 1, "in.onnx", "empty", "0 bytes"),
    _case("truncated", _bytes(lambda b: b[:-200]), OPTIMIZE, 1, "in.onnx", "cut short"),
    _case("text", _text("in.onnx", "hello, world\n" * 9), OPTIMIZE, 1, "not an ONNX model"),
    _case(
        "random-bytes",
        _bytes(lambda _: np.random.default_rng(0).bytes(5000)),
        OPTIMIZE,
        1,
        "not an ONNX model",
    ),
    _case("future-opset", _set_opset(9999), OPTIMIZE, 1, "opset 9999", "upgrade"),
    _case("old-opset", _set_opset(6), OPTIMIZE, 1, "opset 6", "oldest", "7", "convert"),
    _case(
        "future-ir",
        _changed(lambda m: setattr(m, "ir_version", 999)),
        OPTIMIZE,
        1,
        "IR version 999",
        "upgrade",
    ),
    _case("external-missing", external("gone.data"), OPTIMIZE, 1, "w1", "gone.data", "missing"),
    _case("external-cut", external(cut=96), OPTIMIZE, 1, "w1", "4,000", "4,096", "cut short"),
    _case("external-cut-unsized", external(cut=96, length=""), OPTIMIZE, 1, "w1"),
    _case(
        "external-cut-unsized-inspect",
        external(cut=96, length=""),
        "inspect in.onnx",
        1,
        "in.data",
        "cut short",
    ),
    _case("external-parent", external("../w.data"), OPTIMIZE, 1, "../w.data", "outside"),
    _case("external-absolute", external("/etc/passwd"), OPTIMIZE, 1, "/etc/passwd", "outside"),
    _case("external-dot", external("."), OPTIMIZE, 1, "w1", "'.'"),
    _case("external-nowhere", external("x", location=""), OPTIMIZE, 1, "w1", "''"),
    _case("external-offset-text", external(offset="abc"), OPTIMIZE, 1, "w1", "abc"),
    _case("external-offset-negative", external(offset="-8"), OPTIMIZE, 1, "w1", "-8"),
    _case("custom-op", _unknown_op("Mine", "my.domain"), OPTIMIZE, 1, "in.onnx", "can't open"),
    _case("made-up-op", _unknown_op("Bogus", ""), OPTIMIZE, 1, "in.onnx", "Bogus"),
    _case(
        "made-up-op-unverified",
        _unknown_op("Bogus", ""),
        f"{OPTIMIZE} --rank 4 --verify none",
        1,
        "in.onnx",
        "Bogus",
    ),
    _case("missing-input", _without_input(0), OPTIMIZE, 1, "in.onnx"),
    _case("missing-input-unverified", _without_input(0), f"{OPTIMIZE} --verify none", 1, "in.onnx"),
    _case("undefined-input", _changed(_undefined_input), OPTIMIZE, 1, "in.onnx", "nowhere"),
    _case(
        "undefined-input-inspect",
        _changed(_undefined_input),
        "inspect in.onnx",
        1,
        "in.onnx",
        "nowhere",
    ),
    _case("cycle", _changed(_cycle), OPTIMIZE, 1, "in.onnx"),
    _case("cycle-inspect", _changed(_cycle), "inspect in.onnx", 1, "in.onnx"),
    _case(
        "same-output-twice",
        _changed(lambda m: m.graph.node.append(node("Relu", ["h"], "y"))),
        "inspect in.onnx",
        1,
        "in.onnx",
        "'y'",
    ),
    _case(
        "short-weight",
        _changed(
            lambda m: setattr(
                m.graph.initializer[0], "raw_data", m.graph.initializer[0].raw_data[:-8]
            )
        ),
        "inspect in.onnx",
        1,
        "in.onnx",
        "w1",
    ),
    _case(
        "nan-weight",
        lambda: save(weight("w1", np.full((32, 32), np.nan, np.float32))),
        OPTIMIZE,
        1,
        "w1",
        "fc1",
        "1024",
        "NaN",
    ),
    _case(
        "inf-weight",
        lambda: save(weight("w2", np.where(np.eye(32, 8) > 0, np.inf, sample(32, 8)))),
        f"{OPTIMIZE} --verify none",
        1,
        "w2",
        "fc2",
        "8 NaN or infinite values out of 256",
    ),
]

DATA = [
    _case("data-missing", _nothing, f"{OPTIMIZE} --data no.npz", 1, "no.npz", "no such file"),
    _case("data-other-file", _nothing, f"{OPTIMIZE} --data in.onnx", 1, "neither .npz nor .npy"),
    _case("data-wrong-name", _arrays(z=sample(6, 32)), _DATA, 1, "data.npz", "'x'", "has z"),
    _case("data-wrong-shape", _arrays(x=sample(6, 31)), _DATA, 1, "[6, 31]", "31, not 32"),
    _case("data-wrong-rank", _arrays(x=sample(6)), _DATA, 1, "[6]", "x float32[n, 32]"),
    _case(
        "data-high-rank", _arrays(x=sample(6, 2, 3, 32)), _DATA, 1, "[6, 2, 3, 32]", "first axis"
    ),
    _case(
        "data-wrong-dtype",
        _arrays(x=sample(6, 32).astype(np.float64)),
        _DATA,
        1,
        "float64",
        "astype",
    ),
    _case("data-objects", _arrays(x=np.array([{}, {}])), _DATA, 1, "data.npz", "can't read"),
    _case("data-no-samples", _arrays(x=sample(0, 32)), _DATA, 1, "no samples"),
    _case("data-garbage", _text("data.npz", "garbage" * 50), _DATA, 1, "data.npz", "can't read"),
    _case("data-empty-file", _text("data.npz", ""), _DATA, 1, "data.npz", "can't read"),
    _case("data-cut-short", _bytes(lambda b: b[:400], "data.npz"), _DATA, 1, "data.npz"),
    _case(
        "data-corrupt",
        lambda: _corrupt("data.npz"),
        _DATA,
        1,
        "data.npz",
        "can't read",
    ),
    _case("data-npy-named-npz", lambda: _npy_as("data.npz"), _DATA, 1, "data.npz"),
    _case(
        "data-npz-named-npy",
        lambda: _void(Path("data.npz").rename("data.npy")),
        f"{OPTIMIZE} --data data.npy",
        1,
        "data.npy",
    ),
    _case("data-npy-two-inputs", _two_inputs, f"{OPTIMIZE} --data data.npy", 1, "2 inputs", "x, z"),
    _case(
        "data-sample-counts",
        _then(_two_inputs, _arrays(x=sample(6, 32), z=sample(5, 32))),
        _DATA,
        1,
        "x 6",
        "z 5",
    ),
    _case("data-no-inputs", _no_inputs, _DATA, 1, "no inputs"),
    _case("data-empty-folder", _nothing, f"{OPTIMIZE} --data folder", 1, "folder", ".npz"),
    _case("validation-missing", _nothing, f"{_DATA} --validation no.npz", 1, "no.npz"),
    _case("validation-alone", _nothing, f"{OPTIMIZE} --validation data.npz", 2, "--data"),
    _case(
        "validation-unverified",
        _nothing,
        f"{OPTIMIZE} --validation data.npz --verify none",
        2,
        "--validation",
    ),
    _case("labels-missing", _nothing, f"{_DATA} --labels nothere", 1, "'nothere'", "label, x"),
    _case(
        "labels-shape",
        _arrays(x=sample(6, 32), label=np.zeros((6, 2), np.int64)),
        f"{_DATA} --labels label",
        1,
        "int64[6, 2]",
        "6 integers",
    ),
    _case(
        "labels-float",
        _arrays(x=sample(6, 32), label=np.zeros(6)),
        f"{_DATA} --labels label",
        1,
        "float64[6]",
        "integers",
    ),
    _case("labels-alone", _nothing, f"{OPTIMIZE} --labels label", 2, "--labels", "--data"),
    _case("labels-unverified", _nothing, f"{OPTIMIZE} --labels label --verify none", 2, "--labels"),
    _case("top1-without-labels", _nothing, f"{_DATA} --metric top1", 1, "top1", "--labels"),
    _case("metric-unknown", _nothing, f"{OPTIMIZE} --metric f1", 2, "'f1'", "top1, agreement"),
    _case(
        "metric-no-module",
        _nothing,
        f"{OPTIMIZE} --metric no_such_mod:f",
        2,
        "no_such_mod",
        "import",
    ),
    _case("metric-no-function", _nothing, f"{OPTIMIZE} --metric json:nope", 2, "json:nope", "nope"),
    _case(
        "metric-no-callable", _nothing, f"{OPTIMIZE} --metric json:__name__", 2, "no", "function"
    ),
    _case("metric-relative", _nothing, f"{OPTIMIZE} --metric .m:f", 2, "'.m:f'", "import"),
    _case(
        "metric-module-fails",
        _text("bad_import_metric.py", "raise RuntimeError('broken module')\n"),
        f"{OPTIMIZE} --metric bad_import_metric:f",
        2,
        "bad_import_metric:f",
        "broken module",
    ),
    _case(
        "metric-syntax-error",
        _text("bad_syntax_metric.py", "def f(:\n"),
        f"{OPTIMIZE} --metric bad_syntax_metric:f",
        2,
        "bad_syntax_metric:f",
        "import",
    ),
    _case(
        "metric-raises",
        _text("bad_raising_metric.py", "def f(s):\n    raise ValueError('no pictures')\n"),
        f"{OPTIMIZE} --rank 4 --metric bad_raising_metric:f",
        1,
        "bad_raising_metric:f",
        "no pictures",
    ),
    _case(
        "metric-no-number",
        _text("bad_none_metric.py", "def f(s):\n    return None\n"),
        f"{OPTIMIZE} --rank 4 --metric bad_none_metric:f",
        1,
        "bad_none_metric:f",
    ),
    _case(
        "metric-nan",
        _text("bad_nan_metric.py", "def f(s):\n    return float('nan')\n"),
        f"{OPTIMIZE} --rank 4 --metric bad_nan_metric:f",
        1,
        "bad_nan_metric:f",
        "nan",
    ),
    _case(
        "metric-exits",
        _text("bad_exit_metric.py", "import sys\ndef f(s):\n    sys.exit(0)\n"),
        f"{OPTIMIZE} --rank 4 --metric bad_exit_metric:f",
        1,
        "bad_exit_metric:f",
    ),
]

OUTPUTS = [
    _case("out-is-in", _nothing, "optimize in.onnx in.onnx", 2, "same file", "in.onnx"),
    _case("out-is-in-path", _nothing, "optimize in.onnx folder/../in.onnx", 2, "same file"),
    _case(
        "out-is-in-symlink",
        lambda: Path("link.onnx").symlink_to("in.onnx"),
        "optimize in.onnx link.onnx",
        2,
        "same file",
    ),
    _case(
        "out-is-in-hard-link",
        lambda: Path("link.onnx").hardlink_to("in.onnx"),
        "optimize in.onnx link.onnx",
        2,
        "same file",
    ),
    _case("apply-out-is-in", _nothing, "apply plan.json in.onnx in.onnx", 2, "same file"),
    _case("out-is-plan", _nothing, "apply plan.json in.onnx plan.json", 2, "plan.json"),
    _case("out-is-data", _nothing, "optimize in.onnx data.npz --data data.npz", 2, "data.npz"),
    _case(
        "out-is-validation",
        lambda: _void(Path("val.npz").write_bytes(Path("data.npz").read_bytes())),
        "optimize in.onnx val.npz --data data.npz --validation val.npz",
        2,
        "val.npz",
    ),
    _case(
        "out-is-external-data",
        external(),
        "optimize in.onnx in.data --rank 4 --verify none",
        2,
        "in.data",
    ),
    _case("out-no-folder", _nothing, "optimize in.onnx no/out.onnx", 1, "no", "doesn't exist"),
    _case("out-read-only", _nothing, "optimize in.onnx /proc/out.onnx", 1, "/proc"),
    _case("out-folder", _nothing, "optimize in.onnx folder", 1, "folder", "name a file in it"),
    _case("out-fifo", lambda: os.mkfifo("pipe"), "optimize in.onnx pipe", 1, "not a regular file"),
    _case("out-long-name", _nothing, f"optimize in.onnx {'n' * 300}", 1, "name too long"),
    _case("in-fifo", lambda: os.mkfifo("pipe"), "optimize pipe out.onnx", 1, "not a regular file"),
    _case("plan-is-out", _nothing, f"{OPTIMIZE} --plan-out out.onnx", 2, "out.onnx", "two outputs"),
    _case(
        "plan-is-out-path", _nothing, f"{OPTIMIZE} --plan-out folder/../out.onnx", 2, "two outputs"
    ),
    _case("plan-is-in", _nothing, f"{OPTIMIZE} --plan-out in.onnx", 2, "in.onnx", "same file"),
    _case("plan-is-json", _nothing, f"{OPTIMIZE} --plan-out a.json --json a.json", 2, "a.json"),
    _case("json-is-in", _nothing, f"{OPTIMIZE} --json in.onnx", 2, "in.onnx", "same file"),
    _case("json-is-data", _nothing, f"{_DATA} --json data.npz", 2, "data.npz"),
    _case("json-no-folder", _nothing, f"{OPTIMIZE} --json no/r.json", 1, "no", "doesn't exist"),
    _case("plan-no-folder", _nothing, f"{OPTIMIZE} --plan-out no/p.json", 1, "no", "doesn't exist"),
    _case("inspect-json-is-in", _nothing, "inspect in.onnx --json in.onnx", 2, "in.onnx"),
    _case("inspect-json-no-folder", _nothing, "inspect in.onnx --json no/r.json", 1, "no/r.json"),
    _case(
        "bench-json-is-in", _nothing, "bench in.onnx --seconds 0.05 --json in.onnx", 2, "in.onnx"
    ),
    _case(
        "compare-json-is-b",
        lambda: save(network(), "b.onnx"),
        "compare in.onnx b.onnx --json b.onnx",
        2,
        "b.onnx",
    ),
]

_FEW = [
    _case("rank-of-none", _nothing, f"{OPTIMIZE} --rank 8,4,2", 2, "8,4,2", "3 numbers", "tucker2"),
    *(
        _case(f"rank-{text or 'empty'}", _nothing, f"{OPTIMIZE} --rank={text}", 2, "--rank", "auto")
        for text in (
            "",
            "0",
            "-3",
            "1.5",
            "energy:2",
            "energy:0",
            "abc",
            "8,4,2,1",
            "8,",
            "8,0",
            "nan",
            "0.0",
            "1e3",
        )
    ),
    *(
        _case(f"shape-{text}", _nothing, f"{OPTIMIZE} --shape {text}", 2, "--shape", text)
        for text in ("x", "x:", "x:a,32", "x:0,32", "x:00,32", "x:-1,32", "x:1;32", "x:1,", "1,32")
    ),
]

FLAGS = [
    *_FEW,
    _case("rank-huge", _nothing, f"{OPTIMIZE} --rank {'9' * 400}", 2, "--rank"),
    _case("rank-too-long", _nothing, f"{OPTIMIZE} --rank {'9' * 5000}", 2, "--rank"),
    _case("shape-unknown-input", _nothing, f"{OPTIMIZE} --shape z:1,32", 2, "'z'", "x float32"),
    _case("shape-axes", _nothing, f"{OPTIMIZE} --shape x:1,2,32", 2, "x:1,2,32", "[n, 32]"),
    _case("shape-contradicts", _nothing, f"{OPTIMIZE} --shape x:1,33", 2, "x:1,33", "[n, 32]"),
    _case("shape-huge", _nothing, f"{OPTIMIZE} --shape x:{'9' * 20},32", 2, "--shape", "9" * 20),
    _case("shape-with-data", _nothing, f"{_DATA} --shape x:1,32", 2, "--shape", "--data"),
    _case("method-unknown", _nothing, f"{OPTIMIZE} --method magic", 2, "'magic'", "svd"),
    _case("max-drop-negative", _nothing, f"{OPTIMIZE} --max-drop -0.1", 2, "--max-drop", "-0.1"),
    _case("max-drop-nan", _nothing, f"{OPTIMIZE} --max-drop nan", 2, "--max-drop", "nan"),
    _case("max-drop-text", _nothing, f"{OPTIMIZE} --max-drop few", 2, "--max-drop", "few"),
    _case("threads-0", _nothing, f"{OPTIMIZE} --threads 0", 2, "--threads 0", "at least 1"),
    _case("threads-huge", _nothing, f"{OPTIMIZE} --threads {10**12}", 2, "--threads"),
    _case("batch-0", _nothing, f"{OPTIMIZE} --batch 0", 2, "--batch 0", "at least 1"),
    _case("batch-huge", _nothing, f"{OPTIMIZE} --batch {10**20}", 2, "--batch"),
    _case("batch-0-inspect", _nothing, "inspect in.onnx --batch 0", 2, "--batch 0"),
    _case("seed-negative", _nothing, f"{OPTIMIZE} --seed -1", 2, "--seed", "-1"),
    _case("seconds-0", _nothing, "bench in.onnx --seconds 0", 2, "--seconds"),
    _case("seconds-nan", _nothing, "bench in.onnx --seconds nan", 2, "--seconds", "nan"),
    _case("seconds-inf", _nothing, "bench in.onnx --seconds inf", 2, "--seconds", "inf"),
    _case("target-unknown", _nothing, f"{OPTIMIZE} --target joy", 2, "--target", "joy", "latency"),
    _case("target-unrun", _nothing, f"{OPTIMIZE} --target latency --verify none", 2, "--verify"),
    _case("verify-unknown", _nothing, f"{OPTIMIZE} --verify maybe", 2, "--verify", "full"),
    _case("include-regex", _nothing, f"{OPTIMIZE} --include (", 2, "--include", "expression"),
    _case("exclude-regex", _nothing, f"{OPTIMIZE} --exclude [", 2, "--exclude", "expression"),
    _case(
        "include-overflow",
        _nothing,
        f"{OPTIMIZE} --include a{{{'9' * 20}}}",
        2,
        "--include",
        "expression",
    ),
    _case("provider-unknown", _nothing, f"{OPTIMIZE} --provider tpu", 2, "--provider", "cpu"),
    _case(
        "compare-outputs",
        lambda: save(_renamed_output(), "b.onnx"),
        "compare in.onnx b.onnx",
        2,
        "b.onnx",
        "'y'",
    ),
    _case(
        "compare-shapes",
        _then(lambda: save(_sequence(1), "a.onnx"), lambda: save(_sequence(2), "b.onnx")),
        "compare a.onnx b.onnx",
        2,
        "'y'",
        "[1, 5, 8]",
        "[1, 10, 8]",
    ),
]

PLANS = [
    _case(
        "plan-missing", lambda: Path("plan.json").unlink(), APPLY, 2, "plan.json", "No such file"
    ),
    _case("plan-no-json", _text("plan.json", "not json"), APPLY, 2, "plan.json", "no onnxlr plan"),
    _case("plan-binary", _bytes(lambda _: b"\xff\xfe", "plan.json"), APPLY, 2, "plan.json"),
    _case("plan-a-list", _text("plan.json", "[]"), APPLY, 2, "no onnxlr plan"),
    _case("plan-no-layers", _text("plan.json", '{"model": "x"}'), APPLY, 2, "layers"),
    _case("plan-deep", _text("plan.json", "[" * 100_000), APPLY, 2, "no onnxlr plan"),
    _case("plan-seed", _text("plan.json", '{"model":"x","seed":1e999,"layers":[]}'), APPLY, 2),
    _case("plan-no-seed", _plan(lambda p: p.update(seed="x")), APPLY, 2, "no onnxlr plan"),
    _case(
        "plan-other-model",
        lambda: save(weight("w1", sample(32, 32))),
        APPLY,
        2,
        "digest",
        "make a plan for this one",
    ),
    _case("plan-layer-unknown", _row(name="fc9"), APPLY, 2, "'fc9'", "no such layer"),
    _case("plan-method-unknown", _row(decision="magic"), APPLY, 2, "'magic'", "not installed"),
    _case("plan-method-auto", _row(decision="auto"), APPLY, 2, "auto"),
    _case("plan-method-foreign", _row(decision="channel-svd"), APPLY, 2, "fc1", "Conv"),
    *(
        _case(f"plan-rank-{rank}", _row(rank=rank), APPLY, 2, "plan")
        for rank in (
            [0],
            [-4],
            [10**6],
            [33],
            ["4"],
            [4.5],
            [True],
            [4, 4],
            [],
            None,
            4,
            "4",
            [[4]],
        )
    ),
    _case("plan-twice", _plan(lambda p: p["layers"].append(p["layers"][0])), APPLY, 2, "fc1"),
]

CASES = [*MODELS, *DATA, *OUTPUTS, *FLAGS, *PLANS]
_EACH_STAGE = {
    *("truncated", "nan-weight", "data-wrong-shape", "metric-raises", "threads-0", "rank-0"),
    *("made-up-op-unverified", "plan-other-model", "plan-rank-[33]"),
}
WITH_EARLIER_OUTPUT = [case for case in CASES if case.name in _EACH_STAGE]


def _corrupt(name: str) -> None:
    """Break the compressed stream itself, not the zip around it."""
    np.savez_compressed(name, x=sample(6, 32))
    content = bytearray(Path(name).read_bytes())
    content[150:400] = bytes(250)
    Path(name).write_bytes(content)


def _npy_as(name: str) -> None:
    with Path(name).open("wb") as file:
        np.save(file, sample(6, 32))


def _renamed_output() -> onnx.ModelProto:
    model = network()
    model.graph.node[2].output[0] = model.graph.output[0].name = "z"
    return model


def _sequence(copies: int) -> onnx.ModelProto:
    """x float32[1, 5, 8] to y of as many copies in a row."""
    return make_model([node("Concat", ["x"] * copies, "y", axis=1)], {"x": [1, 5, 8]}, ["y"], {})
