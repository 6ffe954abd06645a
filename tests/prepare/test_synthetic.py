"""Synthetic inputs: indices that stay in their table, and sizes that are tried until one runs."""

from typing import Any

import numpy as np
import onnx
import pytest

from onnxlr.model.load import load
from onnxlr.prepare.feeding import open_with_feeding
from onnxlr.prepare.inputs import input_specs, parse_shapes
from onnxlr.prepare.synthetic import candidate_shapes, find_runnable_shapes, synthetic_feed
from onnxlr.system.session import ONE_CPU_THREAD, Session
from tests.support.builders import make_model, node

I64 = onnx.TensorProto.INT64


def embedding_model() -> onnx.ModelProto:
    """Token ids through a reshape into a table of 11 rows, times a mask."""
    model = make_model(
        [
            node("Cast", ["ids"], "c", to=I64),
            node("Unsqueeze", ["c", "axes"], "u"),
            node("Gather", ["table", "u"], "e"),
            node("Cast", ["attention_mask"], "m", to=1),
            node("ReduceSum", ["m"], "t"),
            node("Mul", ["e", "t"], "y"),
        ],
        {"ids": ("batch", "sequence"), "attention_mask": ("batch", "sequence")},
        ["y"],
        {"table": np.ones((11, 3), np.float32), "axes": np.array([2])},
        dtype="int64",
    )
    model.graph.output[0].type.tensor_type.elem_type = 1
    return model


def test_indices_stay_in_the_table_and_masks_are_ones() -> None:
    model = load(embedding_model()).model
    shapes = next(iter(candidate_shapes(input_specs(model), {}, 2)))
    assert shapes == {"ids": (2, 128), "attention_mask": (2, 128)}
    feed = synthetic_feed(model, shapes, np.random.default_rng(0))
    assert feed["ids"].min() == 0
    assert feed["ids"].max() == 10
    assert feed["ids"].dtype == np.int64
    assert (feed["attention_mask"] == 1).all()


def test_sizes_are_tried_until_one_runs() -> None:
    # Only a height of 48 survives the reshape, as in text recognisers.
    model = make_model(
        [node("Reshape", ["x", "shape"], "y")],
        {"x": ("n", 3, "h", "w")},
        ["y"],
        {"shape": np.array([0, 3, 48, 320])},
    )
    source = load(model)
    session = Session(model.SerializeToString(), ONE_CPU_THREAD)
    shapes, level = find_runnable_shapes(source.model, session, {}, 1, 0)
    assert (shapes, level) == ({"x": (1, 3, 48, 320)}, 0)


@pytest.mark.parametrize("trial", ["off", "60"])
def test_sizes_are_searched_wherever_they_are_tried(
    trial: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONNXLR_TRIAL", trial)
    model = make_model(
        [node("Reshape", ["x", "shape"], "y")],
        {"x": ("n", 3, "h", "w")},
        ["y"],
        {"shape": np.array([0, 3, 48, 320])},
    )
    _, feeding = open_with_feeding(load(model), ONE_CPU_THREAD)
    assert feeding.first_feed["x"].shape == (1, 3, 48, 320)


@pytest.mark.parametrize(
    ("views", "axis"),
    [
        ([node("Cast", ["table"], "t", to=1)], 0),
        ([node("Identity", ["table"], "i"), node("Transpose", ["i"], "t", perm=[1, 0])], 1),
        ([node("Transpose", ["table"], "t", perm=[1, 0])], -1),
        ([node("Cast", ["table"], "c", to=1), node("Mul", ["c", "two"], "t")], 0),
    ],
)
def test_indices_stay_in_a_table_that_is_seen_through_views(views: Any, axis: int) -> None:
    """Every row is drawn: else a single one would judge the factorization of all."""
    table = np.ones((150, 7), np.float32)
    model = make_model(
        [*views, node("Gather", ["t", "ids"], "y", axis=axis)],
        {"ids": (64, 16)},
        ["y"],
        {"table": table, "two": np.full((), 2, np.float32)},
        dtype="int64",
    )
    model.graph.output[0].type.tensor_type.elem_type = 1
    _, feeding = open_with_feeding(load(model), ONE_CPU_THREAD)
    assert feeding.first_feed["ids"].min() == 0
    assert feeding.first_feed["ids"].max() == 149


def test_indices_of_several_tables_in_one_input() -> None:
    """Models of categories have a column for each table."""
    sizes = (60, 7, 150)
    nodes = []
    for i, _ in enumerate(sizes):
        if i < 2:
            nodes.append(node("Gather", ["ids", f"column{i}"], f"id{i}", axis=1))
        else:
            nodes += [
                node("Slice", ["ids", "two", "three", "one"], "cut"),
                node("Squeeze", ["cut", "one"], f"id{i}"),
            ]
        nodes.append(node("Gather", [f"table{i}", f"id{i}"], f"e{i}"))
    nodes.append(node("Concat", ["e0", "e1", "e2"], "y", axis=1))
    model = make_model(
        nodes,
        {"ids": ("n", 3)},
        ["y"],
        {
            **{f"table{i}": np.ones((size, 4), np.float32) for i, size in enumerate(sizes)},
            **{f"column{i}": np.array(i) for i in range(2)},
            **{name: np.array([i]) for i, name in enumerate(("one", "two", "three"), 1)},
        },
        dtype="int64",
    )
    model.graph.output[0].type.tensor_type.elem_type = 1
    for seed in range(4):
        _, feeding = open_with_feeding(load(model), ONE_CPU_THREAD, seed=seed)
        ids = np.concatenate([feed["ids"] for feed in feeding.choose])  # type: ignore[union-attr]
        assert ids.min() >= 0
        assert ids.max() <= 6
        assert len(np.unique(ids)) > 3


def test_images_lie_in_the_unit_interval() -> None:
    model = load(make_model([node("Relu", ["x"], "y")], {"x": (1, 3, 8, 8)}, ["y"], {})).model
    feed = synthetic_feed(model, {"x": (1, 3, 8, 8)}, np.random.default_rng(0))
    assert 0 <= feed["x"].min() < feed["x"].max() < 1


def test_the_same_symbol_has_the_same_size() -> None:
    model = load(embedding_model()).model
    specs = input_specs(model)
    fixed = parse_shapes(["ids:3,17"], specs)
    assert next(iter(candidate_shapes(specs, fixed, 1)))["attention_mask"] == (3, 17)


def test_a_recurrent_state_has_its_batch_second() -> None:
    dims = {"x": ("n", "t"), "state": (2, None, 128)}
    model = make_model(
        [node("Identity", ["x"], "y"), node("Identity", ["state"], "z")], dims, ["y", "z"], {}
    )
    specs = input_specs(load(model).model)
    assert next(iter(candidate_shapes(specs, {}, 1))) == {"x": (1, 128), "state": (2, 1, 128)}
