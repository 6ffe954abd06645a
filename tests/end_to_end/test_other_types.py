"""Inputs and outputs that aren't tensors of numbers: strings, maps, sequences, optional values."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

import onnxlr
from onnxlr.errors import DataError, ModelError
from onnxlr.model.load import load
from onnxlr.prepare.feeding import open_with_feeding
from onnxlr.prepare.inputs import input_specs
from onnxlr.prepare.samples import load_samples
from onnxlr.system.session import ONE_CPU_THREAD
from tests.support.builders import Array, low_rank, node, run

RNG = np.random.default_rng(0)
WORDS = [f"w{i}" for i in range(60)]
ML = helper.make_opsetid("ai.onnx.ml", 2)
TABLE, MATRIX = low_rank(RNG, 60, 32, 2), low_rank(RNG, 32, 24, 2)
FLOAT, INT64, STRING = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.STRING
EXACT: dict[str, Any] = {"rank": "exact", "max_drop": 1.0, "measure": False}


def model_of(
    nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: dict[str, Array]
) -> onnx.ModelProto:
    stored = [onnx.numpy_helper.from_array(np.asarray(w), n) for n, w in weights.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, stored)
    imports = [helper.make_opsetid("", 17), ML]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


def embedding(*, flat: bool = False) -> onnx.ModelProto:
    """Words through a vocabulary into a table, and a layer."""
    encoder = helper.make_node(
        *("LabelEncoder", ["flat" if flat else "text"], ["ids"]),
        domain="ai.onnx.ml",
        keys_strings=WORDS,
        values_int64s=list(range(60)),
        default_int64=0,
    )
    first = [node("Reshape", ["text", "all"], "flat")] if flat else []
    nodes = [*first, encoder, node("Gather", ["e", "ids"], "h", "embed")]
    nodes.append(node("MatMul", ["h", "w"], "y", "fc"))
    dims = ["n", "length"]
    return model_of(
        nodes,
        [helper.make_tensor_value_info("text", STRING, dims)],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        {"e": TABLE, "w": MATRIX, "all": np.array([-1])},
    )


def close(before: onnx.ModelProto, after: onnx.ModelProto, feed: dict[str, Array]) -> bool:
    return all(
        np.allclose(a, b, rtol=1e-4, atol=1e-4)
        for a, b in zip(run(before, feed), run(after, feed), strict=True)
    )


TEXT = np.array(WORDS, dtype=object)[RNG.integers(0, 60, (12, 5))]


@pytest.mark.parametrize(
    "text", [None, TEXT.astype(str), np.char.encode(TEXT.astype(str)), TEXT], ids=str
)
@pytest.mark.parametrize("file", ["x.npz", "x.npy"])
def test_strings(text: Array | None, file: str, tmp_path: Path) -> None:
    model, path = embedding(), tmp_path / file
    if text is not None:
        np.savez(path, text=text) if file == "x.npz" else np.save(path, text)
    result = onnxlr.optimize(model, data=None if text is None else path, **EXACT)
    assert [d.decision for d in result.plan.decisions] == ["embedding-svd", "svd"]
    assert close(model, result.model, {"text": TEXT})
    assert [r.layer.name for r in onnxlr.inspect(model)] == ["embed", "fc"]


def test_synthetic_strings_are_words_that_are_known() -> None:
    """All words unknown would be one row of the table: its factors would be judged by that."""
    source = load(embedding(flat=True))
    session, feeding = open_with_feeding(source, ONE_CPU_THREAD)
    words = feeding.first_feed["text"]
    assert set(words.ravel()) <= set(WORDS)
    assert len(set(words.ravel())) > 20
    session.bind(feeding.first_feed)()  # which the runtime can't for text


def test_the_digest_of_text_is_that_of_its_words(tmp_path: Path) -> None:
    digests = []
    for text in (TEXT, TEXT.astype(str), TEXT[::-1]):
        np.save(tmp_path / "x.npy", text)
        specs = input_specs(load(embedding()).model)
        digests.append(load_samples(tmp_path / "x.npy", specs, None).digest())
    assert digests[0] == digests[1] != digests[2]


def test_a_plan_that_was_fitted_to_strings_is_replayed(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", text=TEXT.astype(str))
    result = onnxlr.optimize(embedding(), data=tmp_path / "x.npz", **EXACT)
    again = onnxlr.apply(result.plan, embedding(), data=tmp_path / "x.npz")
    assert again.SerializeToString() == result.model.SerializeToString()


class Opened:
    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("/nowhere/onnxlr-unpickled", "w")


@pytest.mark.parametrize("held", [Opened(), 3, {"a": "b"}, None])
def test_objects_that_are_no_text_are_not_loaded(held: Any, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", text=np.array([["a", held]], dtype=object))
    with pytest.raises(DataError, match="of which only text is loaded"):
        onnxlr.optimize(embedding(), data=tmp_path / "x.npz")
    np.save(tmp_path / "x.npy", np.array([["a", held]], dtype=object))
    with pytest.raises(DataError, match="of which only text is loaded"):
        onnxlr.optimize(embedding(), data=tmp_path / "x.npy")
    assert pickle.dumps(held)


def test_text_and_numbers_are_told_apart(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", text=np.ones((4, 5), np.float32))
    with pytest.raises(DataError, match=r"'text' is float32, the model takes string.*astype\(str"):
        onnxlr.optimize(embedding(), data=tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", text=np.array([[b"\xff"]]))
    with pytest.raises(DataError, match="holds bytes that are no UTF-8 text"):
        onnxlr.optimize(embedding(), data=tmp_path / "x.npz")


def classifier(kind: str) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """A layer, and what ends or begins in another type than a tensor of numbers."""
    nodes = [node("MatMul", ["x", "w"], "z", "fc"), node("Softmax", ["z"], "p")]
    x = helper.make_tensor_value_info("x", FLOAT, ["n", 32])
    inputs, outputs = [x], [helper.make_tensor_value_info("p", FLOAT, ["n", 8])]
    weights = {"w": low_rank(RNG, 32, 8, 2)}
    tensor = helper.make_tensor_type_proto(FLOAT, None)
    feed: dict[str, Any] = {"x": RNG.standard_normal((6, 32)).astype(np.float32)}
    if kind == "map":
        zipped = helper.make_node("ZipMap", ["p"], ["m"], domain="ai.onnx.ml")
        zipped.attribute.append(helper.make_attribute("classlabels_strings", list("abcdefgh")))
        nodes.append(zipped)
        each = helper.make_map_type_proto(STRING, tensor)
        outputs.insert(0, helper.make_value_info("m", helper.make_sequence_type_proto(each)))
    elif kind == "sequence":
        nodes.append(node("SplitToSequence", ["p"], "s", axis=1))
        outputs.append(helper.make_value_info("s", helper.make_sequence_type_proto(tensor)))
    elif kind == "words":
        nodes.append(node("ArgMax", ["p"], "i", axis=1, keepdims=0))
        nodes.append(node("Gather", ["names", "i"], "word"))
        weights["names"] = np.array(list("abcdefgh"), dtype=object)
        outputs.append(helper.make_tensor_value_info("word", STRING, ["n"]))
    elif kind == "optional input":
        inputs.append(helper.make_value_info("o", helper.make_optional_type_proto(tensor)))
        nodes.append(node("OptionalHasElement", ["o"], "there"))
        outputs.append(helper.make_tensor_value_info("there", onnx.TensorProto.BOOL, []))
        feed["o"] = None
    else:
        inputs.append(helper.make_value_info("s", helper.make_sequence_type_proto(tensor)))
        nodes.append(node("SequenceLength", ["s"], "length"))
        outputs.append(helper.make_tensor_value_info("length", INT64, []))
    return model_of(nodes, inputs, outputs, weights), feed


@pytest.mark.parametrize("kind", ["map", "sequence", "words", "optional input"])
@pytest.mark.parametrize("data", [False, True])
def test_other_outputs_and_inputs_pass_through(kind: str, data: bool, tmp_path: Path) -> None:
    model, feed = classifier(kind)
    np.savez(tmp_path / "x.npz", x=feed["x"])
    result = onnxlr.optimize(model, data=tmp_path / "x.npz" if data else None, **EXACT)
    assert [d.decision for d in result.plan.decisions] == ["svd"]
    for before, after in ((model.graph.input, result.model.graph.input),
                          (model.graph.output, result.model.graph.output)):  # fmt: skip
        assert [v.SerializeToString() for v in before] == [v.SerializeToString() for v in after]
    place = [o.name for o in model.graph.output].index("p")
    np.testing.assert_allclose(run(model, feed)[place], run(result.model, feed)[place], rtol=1e-4)
    assert onnxlr.compare(model, result.model).quality.fidelity.rel_error < 1e-5
    onnx.checker.check_model(onnxlr.optimize(model, rank="exact", verify="none").model)


def test_inputs_that_no_file_holds_say_what_works_instead() -> None:
    model, _ = classifier("sequence input")
    with pytest.raises(
        ModelError, match="'s' is a sequence, which no file of samples holds: --verify layers"
    ):
        onnxlr.optimize(model)
    result = onnxlr.optimize(model, rank="exact", verify="layers", measure=False)
    assert [d.decision for d in result.plan.decisions] == ["svd"]
    assert len(onnxlr.inspect(model)) == 1
