"""Hostile models: each kind that broke the command once, as one small case."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, TensorProto, helper

import onnxlr
from onnxlr.errors import ModelError, readable
from tests.support.builders import relative, replaced, run
from tests.support.hostile_seeds import SEEDS, externalize, mlp
from tests.support.refusals import refusal_of

pytestmark = pytest.mark.usefixtures("trials")


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
        ("'fc2'", "from a function, but is in none"),
    ),
    Case("input-of-no-type", lambda m: _typed(m, 0), ("'x'", "no declared type")),
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


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_broken_model_is_refused_in_a_line(case: Case) -> None:
    model = SEEDS[case.seed]()
    case.change(model)
    Path("in.onnx").write_bytes(model.SerializeToString())
    line = refusal_of(case.command)
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
    line = refusal_of("inspect in.onnx")
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
    assert "not an ONNX model" in refusal_of("inspect in.onnx")


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
    """Weights are in half and double precision, with Gemm's alpha, or behind a Cast."""
    model = SEEDS[name]()
    rows = onnxlr.optimize(model, method="tiled-svd", rank="4,2,1", verify="none").plan.decisions
    assert {row.op for row in rows} == ({"MatMul"} if name == "views" else {"MatMul", "Gemm"})
    tiled = replaced(model, "tiled-svd", (4, 2, 1))
    kind = {"mlp-half": np.float16, "mlp-double": np.float64}.get(name, np.float32)
    feed = {"x": np.random.default_rng(0).standard_normal((4, 24)).astype(kind)}
    assert relative(run(model, feed)[0], run(tiled, feed)[0]) < 2e-3


def test_a_row_of_thousands_of_identities() -> None:
    """The chain is longer than Python's stack is deep."""
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
    assert (row.layer.weight.name, row.layer.refusal) == ("w1/folded", None)


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
    assert "'w1' has length 2, its shape [24, 24] needs 2,304" in refusal_of("inspect in.onnx")


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("kind", ["symlink_to", "hardlink_to"])
def test_external_data_behind_a_link(kind: str) -> None:
    model = mlp()
    Path("other.data").write_bytes(externalize(model))
    getattr(Path("in.data"), kind)("other.data")
    onnx.save(model, "in.onnx")
    for command in ("inspect in.onnx", "optimize in.onnx out.onnx --include nothing"):
        assert " link" in refusal_of(command)


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
    assert all("their squares overflow" in d.reason for d in result.plan.decisions)
    onnxlr.inspect(model)


def test_outputs_that_are_no_numbers() -> None:
    models = [mlp(), mlp()]
    for model, value in zip(models, (np.inf, -np.inf), strict=True):
        model.graph.initializer[2].raw_data = np.full(16, value, np.float32).tobytes()
    assert onnxlr.compare(models[0], models[0]).quality.fidelity.divergence == 0
    assert onnxlr.compare(*models).quality.fidelity.divergence == np.inf
