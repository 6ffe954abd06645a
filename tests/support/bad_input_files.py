"""The files of commands that must be refused: a small network, and each way to break it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from tests.support.builders import low_rank, make_model, node

Array = NDArray[Any]


Setup = Callable[[], None]


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


def changed(change: Callable[[onnx.ModelProto], object]) -> Setup:
    """IN after a change to the network."""

    def setup() -> None:
        model = network()
        change(model)
        save(model)

    return setup


def edited(change: Callable[[bytes], bytes], name: str = "in.onnx") -> Setup:
    """A file after a change to its bytes."""
    return lambda: discard(Path(name).write_bytes(change(Path(name).read_bytes())))


def text_file(name: str, text: str) -> Setup:
    return lambda: discard(Path(name).write_text(text, encoding="utf-8"))


def arrays_file(**arrays: Array) -> Setup:
    return lambda: np.savez("data.npz", **arrays)  # type: ignore[arg-type]


def one_by_one(*setups: Setup) -> Setup:
    def setup() -> None:
        for each in setups:
            each()

    return setup


def discard(_: object) -> None:
    """Let an expression stand for a setup."""


def sample(*shape: int) -> Array:
    return np.random.default_rng(2).standard_normal(shape).astype(np.float32)


def set_opset(version: int) -> Setup:
    return changed(lambda m: setattr(m.opset_import[0], "version", version))


def unknown_op(op: str, domain: str) -> Setup:
    def change(model: onnx.ModelProto) -> None:
        model.graph.node[1].op_type = op
        model.graph.node[1].domain = domain
        if domain:
            model.opset_import.add(domain=domain, version=1)

    return changed(change)


def without_input(index: int) -> Setup:
    """A node that lacks an input the operator can't do without."""
    return changed(lambda m: m.graph.node[index].input.pop())


def undefined_input(model: onnx.ModelProto) -> None:
    model.graph.node[2].input[1] = "nowhere"


def cycle(model: onnx.ModelProto) -> None:
    model.graph.node.extend([node("Identity", ["a"], "b"), node("Identity", ["b"], "a")])
    model.graph.node[0].input[1] = "a"


def two_inputs() -> None:
    save(
        make_model(
            [node("Add", ["x", "z"], "s"), node("MatMul", ["s", "w"], "y", "fc")],
            {"x": ["n", 32], "z": ["n", 32]},
            ["y"],
            {"w": low_rank(np.random.default_rng(1), 32, 32, 4)},
        )
    )
    np.save("data.npy", sample(6, 32))


def no_inputs() -> None:
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


def changed_plan(change: Callable[[dict[str, Any]], object]) -> Setup:
    def setup() -> None:
        plan = json.loads(Path("plan.json").read_text(encoding="utf-8"))
        change(plan)
        Path("plan.json").write_text(json.dumps(plan), encoding="utf-8")

    return setup


def changed_row(**fields: object) -> Setup:
    return changed_plan(lambda plan: plan["layers"][0].update(fields))


def nothing() -> None:
    """Everything is as it should be: the command line is what is wrong."""


def corrupt_archive(name: str) -> None:
    """Break the compressed stream itself, not the zip around it."""
    np.savez_compressed(name, x=sample(6, 32))
    content = bytearray(Path(name).read_bytes())
    content[150:400] = bytes(250)
    Path(name).write_bytes(content)


def npy_under(name: str) -> None:
    with Path(name).open("wb") as file:
        np.save(file, sample(6, 32))


def renamed_output() -> onnx.ModelProto:
    model = network()
    model.graph.node[2].output[0] = model.graph.output[0].name = "z"
    return model


def sequence(copies: int) -> onnx.ModelProto:
    """x float32[1, 5, 8] to y of as many copies in a row."""
    return make_model([node("Concat", ["x"] * copies, "y", axis=1)], {"x": [1, 5, 8]}, ["y"], {})
