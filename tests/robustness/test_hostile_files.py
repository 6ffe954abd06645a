"""Hostile files: what the fuzzer found, each kind as one small case."""

import io
import json
import os
import pickle
import signal
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import AttributeProto, TensorProto, helper

import onnxlr
from models.fuzz.run import sound_files
from onnxlr.cli.commands import main
from onnxlr.errors import CrashError, ModelError, readable
from onnxlr.model.load import load
from onnxlr.prepare import shapes
from onnxlr.system import deadline, npz, trial
from onnxlr.system.session import ONE_CPU_THREAD, Session
from onnxlr.system.trial import Trial
from tests.support.builders import abort, relative, replaced, run
from tests.support.hostile_seeds import SEEDS, externalize, mlp

Change = Callable[[onnx.ModelProto], object]


@dataclass(frozen=True)
class Case:
    """A change to a sound model, and the words of the line that refuses it."""

    name: str
    change: Change
    words: tuple[str, ...]
    seed: str = "mlp"
    command: str = "inspect in.onnx"


def _attribute(name: str, value: Any) -> Change:
    """The first node has one more attribute."""
    return lambda m: m.graph.node[0].attribute.append(helper.make_attribute(name, value))


def _fields(**fields: Any) -> Change:
    """The first weight has other fields."""

    def change(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[0]
        for name, value in fields.items():
            tensor.ClearField(name)
            if isinstance(value, list):
                getattr(tensor, name).extend(value)
            elif value is not None:
                setattr(tensor, name, value)

    return change


def _node(op: str, inputs: Sequence[str], output: str, **attributes: Any) -> Change:
    """One more node at the end."""
    return lambda m: m.graph.node.append(helper.make_node(op, inputs, [output], **attributes))


def _functions(calls: Sequence[Sequence[int]]) -> Change:
    """One local function for each entry, which calls those that it lists, in a row."""

    def change(model: onnx.ModelProto) -> None:
        imports = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
        for i, called in enumerate(calls):
            names = ["a", *(f"t{j}" for j in range(1, len(called))), "b"]
            nodes = [
                helper.make_node(f"F{other}", [names[j]], [names[j + 1]], domain="f")
                for j, other in enumerate(called)
            ]
            made = nodes or [helper.make_node("Relu", ["a"], ["b"])]
            model.functions.append(helper.make_function("f", f"F{i}", ["a"], ["b"], made, imports))
        model.opset_import.append(helper.make_opsetid("f", 1))
        model.graph.node.append(helper.make_node("F0", ["x"], ["called"], domain="f"))

    return change


def _declared(*dims: int) -> Change:
    """The input declares these sizes."""

    def change(model: onnx.ModelProto) -> None:
        model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", 1, dims))

    return change


def _then_body(model: onnx.ModelProto) -> onnx.GraphProto:
    (node,) = (n for n in model.graph.node if n.op_type == "If")
    body: onnx.GraphProto = node.attribute[0].g
    return body


CASES = [
    Case("no-name", _fields(name=None), ("[24, 24]", "has no name")),
    Case("no-type", _fields(data_type=0), ("'w1'", "type 0")),
    Case("unknown-type", _fields(data_type=99), ("'w1'", "type 99")),
    Case(
        "values-in-another-field",
        _fields(raw_data=None, double_data=[0.0] * 576),
        ("'w1'", "576 values in float_data", "has 0"),
    ),
    Case(
        "too-few-values",
        _fields(raw_data=None, float_data=[0.0] * 500),
        ("'w1'", "576 values in float_data", "has 500"),
    ),
    Case(
        "too-few-texts",
        _fields(raw_data=None, data_type=TensorProto.STRING, string_data=[b"a"]),
        ("'w1'", "string_data"),
    ),
    Case("empty-and-huge", _fields(dims=[0, 2**60], raw_data=b""), ("'w1'", "larger than any")),
    Case("too-many-axes", _fields(dims=[1] * 65, raw_data=b"abcd"), ("'w1'", "65 axes")),
    Case("attribute-twice", _attribute("axis", 0), ("'embed'", "'axis'", "twice"), "embedding"),
    Case(
        "attribute-other-type",
        _attribute("auto_pad", 7),
        ("'conv1'", "'auto_pad'", "INT", "STRING"),
        "convnet",
    ),
    Case(
        "attribute-without-value",
        lambda m: m.graph.node[0].attribute.add(name="group", type=AttributeProto.INT),
        ("'conv1'", "'group'", "without a value"),
        "convnet",
    ),
    Case(
        "attribute-missing",
        lambda m: m.graph.node[0].ClearField("attribute"),
        ("Cast", "lacks", "'to'"),
        "views",
    ),
    Case(
        "constant-of-two",
        lambda m: m.graph.node[5].attribute.append(helper.make_attribute("value_int", 3)),
        ("Constant", "2 values"),
        "views",
    ),
    Case("unproduced-output", lambda m: m.graph.output.add(name="gone"), ("'gone'", "nothing")),
    Case(
        "unproduced-output-of-a-body",
        lambda m: setattr(_then_body(m).output[0], "name", "gone"),
        ("'gone'", "nothing"),
        "branches",
    ),
    Case("too-many-inputs", lambda m: m.graph.node[0].input.append("x"), ("'fc1'", "at most 2")),
    Case("nameless-input", lambda m: _set(m.graph.node[0].input, 0, ""), ("'fc1'", "no 'A'")),
    Case(
        "nameless-one-of-many", lambda m: _set(m.graph.node[6].input, 0, ""), ("'einsum'",), "views"
    ),
    Case(
        "two-opsets",
        lambda m: m.opset_import.append(helper.make_opsetid("ai.onnx", 7)),
        ("[7, 17]", "has to be one"),
    ),
    Case(
        "opset-of-a-function",
        lambda m: setattr(m.functions[0].opset_import[0], "version", 2**40),
        ("'Dense'", "opset 1099511627776"),
        "functions",
    ),
    Case(
        "reference-outside-of-functions",
        lambda m: setattr(m.graph.node[2].attribute[0], "ref_attr_name", "outer"),
        ("'fc2'", "of a function, and is in none"),
    ),
    Case("input-of-no-type", lambda m: _typed(m, 0), ("'x'", "no tensor of a declared type")),
    Case("calls-itself", _functions([[1], [0]]), ("calls itself",)),
    Case("explodes", _functions([*([i, i] for i in range(1, 40)), []]), ("1,000,000 nodes",)),
    Case("calls-deep", _functions([*([i] for i in range(1, 5100)), []]), ("5,100 deep",)),
    Case(
        "huge-input",
        _declared(2**31, 24),
        ("x float32[2147483648, 24]", "51,539,607,552 elements", "--shape"),
        command="optimize in.onnx out.onnx",
    ),
]


def _set(values: Any, index: int, value: str) -> None:
    values[index] = value


def _typed(model: onnx.ModelProto, kind: int) -> None:
    model.graph.input[0].type.tensor_type.elem_type = kind


def _in_a_line(command: str) -> str:
    """Run a command that must be refused, and return its line."""
    before = {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()}
    result = CliRunner().invoke(main, command.split())
    assert result.exit_code == 1, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("onnxlr: ")
    assert "internal error" not in line
    assert line.isprintable()
    assert len(line) < 2000
    assert {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()} == before
    return line


@pytest.fixture(autouse=True)
def _trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(deadline.TRIAL_VARIABLE, raising=False)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_broken_model_is_refused_in_a_line(case: Case) -> None:
    model = SEEDS[case.seed]()
    case.change(model)
    Path("in.onnx").write_bytes(model.SerializeToString())
    line = _in_a_line(case.command)
    assert not [word for word in case.words if word not in line], line


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"w1", b"\xff\xfe", ("no UTF-8",)),
        (b"fc1", b"\n\x1b[", ("without a value",)),
    ],
    ids=["no-text", "control-characters"],
)
def test_names_of_any_bytes(old: bytes, new: bytes, words: Sequence[str]) -> None:
    model = mlp()
    model.graph.node[0].attribute.add(name="group", type=AttributeProto.INT)
    Path("in.onnx").write_bytes(model.SerializeToString().replace(old, new))
    line = _in_a_line("inspect in.onnx")
    assert not [word for word in words if word not in line], line


@pytest.mark.usefixtures("here")
def test_graphs_within_graphs_deeper_than_can_be_parsed() -> None:
    """A thousand Ifs, each in the branch of the one before."""

    def field(number: int, content: bytes) -> bytes:
        size, length = len(content), b""
        while size > 127:
            length, size = length + bytes([size & 127 | 128]), size >> 7
        return bytes([number << 3 | 2]) + length + bytes([size]) + content

    graph = field(2, b"leaf")
    for _ in range(1000):
        graph = field(1, field(5, field(1, b"then_branch") + field(6, graph)))
    Path("in.onnx").write_bytes(b"\x08\x08" + field(8, b"\x10\x11") + field(7, graph))
    assert "not an ONNX model" in _in_a_line("inspect in.onnx")


def test_a_message_stays_a_line() -> None:
    assert readable("a\nb\x00\x1b[31m é") == "a b\\x00\\x1b[31m é"
    assert len(readable("n" * 10**6)) < 2000
    assert "\n" not in str(ModelError("a\nb"))


@pytest.mark.parametrize("perm", [[0, 0], [5, 1], [0], [-1, 0]], ids=str)
def test_a_transpose_that_makes_no_sense_keeps_the_layer(perm: list[int]) -> None:
    model = SEEDS["views"]()
    model.graph.node[1].attribute[0].CopyFrom(helper.make_attribute("perm", perm))
    rows = onnxlr.inspect(model, include="back|there")
    assert any("makes no sense" in (row.layer.refusal or "") for row in rows)


def test_a_cast_to_nothing_keeps_the_layer() -> None:
    model = SEEDS["views"]()
    model.graph.node[0].attribute[0].i = 2**40
    (row, *_) = onnxlr.inspect(model)
    assert "Cast to undefined" in (row.layer.refusal or "")


@pytest.mark.parametrize("name", ["mlp-half", "mlp-double", "views"])
def test_tiles_of_weights_in_other_types(name: str) -> None:
    """Half and double precision with Gemm's alpha, and a weight behind a Cast."""
    model = SEEDS[name]()
    rows = onnxlr.optimize(model, method="tiled-svd", rank="4,2,1", verify="none").plan.decisions
    assert {row.op for row in rows} > {"MatMul"}
    tiled = replaced(model, "tiled-svd", (4, 2, 1))
    kind = {"mlp-half": np.float16, "mlp-double": np.float64}.get(name, np.float32)
    feed = {"x": np.random.default_rng(0).standard_normal((4, 24)).astype(kind)}
    assert relative(run(model, feed)[0], run(tiled, feed)[0]) < 2e-3


def test_a_row_of_thousands_of_identities() -> None:
    """Longer than Python's stack is deep."""
    model = SEEDS["embedding"]()
    names = ["x", *(f"i{i}" for i in range(3000))]
    for before, after in pairwise(names):
        model.graph.node.insert(0, helper.make_node("Identity", [before], [after]))
    model.graph.node[3000].input[1] = names[-1]
    assert onnxlr.bench(model, seconds=0.05).a.median_ms > 0


def test_constants_along_more_paths_than_nodes() -> None:
    """Fourteen Concats of a hundred times the one before: 100¹⁴ ways to the constant."""
    model = mlp()
    last = "w1"
    for i in range(14):
        node = helper.make_node("Sum", [last] * 100, [f"s{i}"])
        model.graph.node.insert(i, node)
        last = f"s{i}"
    model.graph.node[14].input[1] = last
    (row, *_) = onnxlr.inspect(model)
    assert "computed by Sum" in (row.layer.refusal or "")


def test_a_call_without_what_the_body_needs_is_not_inlined() -> None:
    model = SEEDS["functions"]()
    model.functions[1].node[0].ClearField("input")
    reasons = [row.layer.refusal or "" for row in onnxlr.inspect(model)]
    assert "in the local function 'Dense', which can't be inlined" in reasons


def test_a_function_called_ten_thousand_times_is_not_inlined() -> None:
    """Naming the inlined nodes would take the square of that."""
    model = mlp()
    _functions([*([i, i] for i in range(1, 15)), []])(model)
    started = time.monotonic()
    assert len(onnxlr.inspect(model)) == 2
    assert time.monotonic() - started < 30


@pytest.mark.usefixtures("here")
def test_external_data_shorter_than_its_weight() -> None:
    model = mlp()
    Path("in.data").write_bytes(externalize(model))
    (entry,) = (e for e in model.graph.initializer[0].external_data if e.key == "length")
    entry.value = "2"
    onnx.save(model, "in.onnx")
    assert "'w1' has length 2, its shape [24, 24] needs 2,304" in _in_a_line("inspect in.onnx")


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("kind", ["symlink_to", "hardlink_to"])
def test_external_data_behind_a_link(kind: str) -> None:
    model = mlp()
    Path("other.data").write_bytes(externalize(model))
    getattr(Path("in.data"), kind)("other.data")
    onnx.save(model, "in.onnx")
    for command in ("inspect in.onnx", "optimize in.onnx out.onnx --include nothing"):
        assert " link" in _in_a_line(command)


@pytest.mark.parametrize("kernel_shape", [[3], [3, 3, 3], [5, 5], [0, 3], [-3, 3]], ids=str)
def test_a_convolution_that_contradicts_its_kernel_is_kept(kernel_shape: list[int]) -> None:
    model = SEEDS["convnet"]()
    (attribute,) = (a for a in model.graph.node[0].attribute if a.name == "kernel_shape")
    attribute.ints[:] = kernel_shape
    (row, *_) = onnxlr.inspect(model, include="conv1|bn")
    assert f"kernel_shape {kernel_shape} don't fit" in (row.layer.refusal or "")


@pytest.mark.parametrize("scale", [1e150, 1e200, 1e300])
@pytest.mark.parametrize("options", [{"verify": "none"}, {"measure": False}], ids=str)
def test_values_whose_squares_leave_the_range(scale: float, options: dict[str, Any]) -> None:
    model = SEEDS["mlp-double"]()
    for tensor in model.graph.initializer[:2]:
        tensor.raw_data = (onnx.numpy_helper.to_array(tensor) * scale).tobytes()
    result = onnxlr.optimize(model, rank="exact", **options)
    assert all("beyond all numbers" in d.reason for d in result.plan.decisions)
    onnxlr.inspect(model)


@pytest.mark.usefixtures("here")
def test_samples_that_are_no_numbers() -> None:
    """NaN that signals, infinity and the largest double, among sound samples."""
    onnx.save(SEEDS["mlp-double"](), "in.onnx")
    x = np.random.default_rng(0).standard_normal((40, 24))
    x[3, 4], x[9], x[17] = np.inf, 1e308, -1e200
    x[5].view(np.uint64)[:] = 0x7FF0000000000001
    np.save("data.npy", x)
    result = onnxlr.optimize("in.onnx", data="data.npy", rank=4, max_drop=1, measure=False)
    assert len(result.plan.decisions) == 2


def test_outputs_that_are_no_numbers() -> None:
    models = [mlp(), mlp()]
    for model, value in zip(models, (np.inf, -np.inf), strict=True):
        model.graph.initializer[2].raw_data = np.full(16, value, np.float32).tobytes()
    assert onnxlr.compare(models[0], models[0]).quality.fidelity.divergence == 0
    assert onnxlr.compare(*models).quality.fidelity.divergence == np.inf


# ---- what the runtime does to itself


def _endless() -> onnx.ModelProto:
    model = SEEDS["loop"]()
    (times,) = (t for t in model.graph.initializer if t.name == "times")
    times.raw_data = np.int64(2**62).tobytes()
    return model


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("command", ["optimize in.onnx out.onnx", "bench in.onnx"])
def test_a_model_without_end(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(deadline.TRIAL_VARIABLE, "1.5")
    onnx.save(_endless(), "in.onnx")
    started = time.monotonic()
    line = _in_a_line(command)
    assert "in.onnx in ONNX Runtime takes more than 2 s" in line
    assert "ONNXLR_TRIAL=600" in line
    assert time.monotonic() - started < 30


def _endless_at(sample: int) -> tuple[onnx.ModelProto, np.ndarray[Any, Any]]:
    """A loop that goes on as long as its input says, and samples of which one says: for ever."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["going"]),
            helper.make_node("Relu", ["v"], ["w"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", TensorProto.FLOAT, [1, 24]),
        ],
        [
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("w", TensorProto.FLOAT, [1, 24]),
        ],
    )
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
        helper.make_node("Cast", ["most"], ["times"], to=TensorProto.INT64),
        helper.make_node("MatMul", ["x", "m"], ["h"]),
        helper.make_node("Loop", ["times", "", "h"], ["y"], body=body),
    ]
    weight = np.random.default_rng(0).standard_normal((24, 24)).astype(np.float32)
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 24])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 24])],
        [onnx.numpy_helper.from_array(weight, "m")],
    )
    x = np.ones((8, 1, 24), np.float32)
    x[sample] = 1e18
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), x


def test_shapes_are_not_observed_at_any_price(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that runs may crash the runtime once it has more outputs."""
    monkeypatch.delenv(deadline.TRIAL_VARIABLE, raising=False)
    model, x = _endless_at(0)
    graph = load(model).model
    assert shapes.observe_shapes(graph, ["h"], {"x": x[1]}, ONE_CPU_THREAD) == {"h": (1, 24)}
    monkeypatch.setattr(shapes, "_observe", abort)
    assert shapes.observe_shapes(graph, ["h"], {"x": x[1]}, ONE_CPU_THREAD) == {}


def test_what_is_timed_is_stopped_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model may have an end where it is tried, and none on a later run: by chance, say."""
    monkeypatch.setenv(deadline.TRIAL_VARIABLE, "2")
    model, x = _endless_at(0)
    session = Session(model.SerializeToString(), ONE_CPU_THREAD, "the model")
    session.bind({"x": x[1]})()
    for _ in range(2):
        with pytest.raises(CrashError, match="the model ran for 2 s on these inputs"):
            session.bind({"x": x[0]})()


@pytest.mark.usefixtures("here")
def test_a_model_without_end_on_one_sample_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(deadline.TRIAL_VARIABLE, "3")
    model, x = _endless_at(5)
    onnx.save(model, "in.onnx")
    np.savez("data.npz", x=x[:, 0])
    started = time.monotonic()
    line = _in_a_line("optimize in.onnx out.onnx --data data.npz --metric rel-error")
    assert "it may have no end" in line or "takes more than" in line
    assert time.monotonic() - started < 40


@pytest.mark.usefixtures("here")
def test_a_model_that_asks_for_all_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "available_memory", lambda: 1 << 20)
    model = SEEDS["shapes"]()
    (size,) = (t for t in model.graph.initializer if t.name == "size")
    size.raw_data = np.array([2**20, 2**20], np.int64).tobytes()
    onnx.save(model, "in.onnx")
    line = _in_a_line("optimize in.onnx out.onnx")
    assert "2.1 GB of memory" in line


def _crash(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def test_a_model_that_crashes_the_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_run_session", _crash)
    with pytest.raises(CrashError, match="opening <model> crashes ONNX Runtime"):
        onnxlr.bench(mlp())


def test_a_trial_tells_what_fails_and_goes_on() -> None:
    with Trial(mlp().SerializeToString(), ONE_CPU_THREAD, "net", 4000) as tried:
        with pytest.raises(ModelError, match=r"net fails on inputs x float32\[2, 23\]"):
            tried.run({"x": np.zeros((2, 23), np.float32)})
        tried.run({"x": np.zeros((2, 24), np.float32)})
    with (
        Trial(b"no model", ONE_CPU_THREAD, "net", 8) as tried,
        pytest.raises(ModelError, match="can't open net"),
    ):
        tried.open()


@pytest.mark.parametrize("text", ["soon", "-1", "nan", "1e9"])
def test_a_trial_of_no_time(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(deadline.TRIAL_VARIABLE, text)
    with pytest.raises(onnxlr.UsageError, match="neither off nor a number"):
        onnxlr.bench(mlp())


def test_no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(deadline.TRIAL_VARIABLE, "off")
    monkeypatch.setattr(trial, "run_in_sandbox", None)
    assert onnxlr.bench(mlp(), seconds=0.05).a.median_ms > 0


# ---- samples and what is kept


class _Canary:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path("unpickled").touch, ()


def _npz(header: dict[str, Any], content: bytes) -> None:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, header)
    with zipfile.ZipFile("data.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", file.getvalue() + content)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("descr", "shape", "content", "word"),
    [
        ("|O", (1,), pickle.dumps(_Canary()), "Python objects"),
        ("<f4", (2**40, 24), b"1234", "needs 105,553,116,266,496 bytes and has 4"),
        ("<f4", (2, 24), b"1234", "needs 192 bytes and has 4"),
    ],
    ids=["objects", "huge", "short"],
)
def test_samples_that_lie(descr: str, shape: tuple[int, ...], content: bytes, word: str) -> None:
    onnx.save(mlp(), "in.onnx")
    _npz({"descr": descr, "fortran_order": False, "shape": shape}, content)
    assert word in _in_a_line("optimize in.onnx out.onnx --data data.npz")


@pytest.mark.usefixtures("here")
def test_samples_that_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npz, "available_memory", lambda: 1 << 20)
    monkeypatch.setattr(npz, "_ALWAYS_READ", 1 << 20)
    onnx.save(mlp(), "in.onnx")
    _npz({"descr": "<f4", "fortran_order": False, "shape": (10**6,)}, bytes(4 * 10**6))
    assert "1,048,576 bytes of memory are free" in _in_a_line(
        "optimize in.onnx out.onnx --data data.npz"
    )


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    "command",
    [
        "optimize in.onnx out.onnx --data pipe.npy",
        "optimize in.onnx out.onnx --data folder",
        "optimize in.onnx out.onnx --latency-table pipe.npy",
        "apply pipe.npy in.onnx out.onnx",
    ],
)
def test_nothing_waits_for_a_pipe(command: str) -> None:
    onnx.save(mlp(), "in.onnx")
    os.mkfifo("pipe.npy")
    Path("folder").mkdir()
    os.mkfifo("folder/a.npy")
    result = CliRunner().invoke(main, command.split())
    assert result.exit_code in (1, 2)
    (line,) = result.stderr.splitlines()
    assert "not a regular file" in line or "no latency table" in line


def test_a_cache_that_was_tampered_with_is_done_without(here: Path) -> None:
    sound = sound_files()
    assert {Path(n).suffix for n in sound.cache} == {".json", ".npz"}
    cache = Path(os.environ["ONNXLR_CACHE"])
    onnx.save(mlp(), "in.onnx")
    x = np.random.default_rng(3).standard_normal((12, 24)).astype(np.float32)
    np.savez("data.npz", x=x)

    def plan() -> str:
        found = onnxlr.optimize("in.onnx", data="data.npz", measure=False, jobs=1).plan
        return json.dumps([(d.name, d.decision, d.rank) for d in found.decisions])

    expected = plan()
    files = sorted(cache.iterdir())
    assert {f.suffix for f in files} == {".json", ".npz"}
    for file in files:
        if file.suffix == ".json":
            text = json.loads(file.read_text(encoding="utf-8"))
            text["entry"] = {"fc1": 7}
            file.write_text(json.dumps(text), encoding="utf-8")
        else:
            with np.load(file) as held:
                odd = {name: np.array([np.nan]) for name in held.files}
            np.savez(file, allow_pickle=False, **odd)
    assert plan() == expected
    assert here.exists()


def test_a_path_that_is_no_text(tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"in\xff.onnx")
    onnx.save(mlp(), tmp_path / "in.onnx")
    (tmp_path / "in.onnx").rename(odd)
    for command in (["inspect", str(odd)], ["optimize", "in.onnx", str(odd)]):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 1
        assert "isn't text in UTF-8" in result.stderr
