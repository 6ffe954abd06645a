"""Ways to make a small model ask for gigantic memory, endless time or endless nesting."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from models.fuzz.basics import Rng, any_weight, pick


def many(model: onnx.ModelProto, rng: Rng) -> None:
    """Thousands of inputs, outputs, weights or nodes."""
    change, count = int(rng.integers(4)), 3000
    if change == 0:
        model.graph.input.extend(
            helper.make_tensor_value_info(f"in{i}", 1, [1]) for i in range(count)
        )
    elif change == 1 and model.graph.output:
        model.graph.output.extend([model.graph.output[0]] * count)
    elif change == 2:
        shared = any_weight(model, rng)
        for i in range(count):
            model.graph.initializer.add().CopyFrom(shared)
            model.graph.initializer[-1].name = f"extra{i}"
    elif model.graph.input:
        last = model.graph.input[0].name
        for i in range(count):
            model.graph.node.append(helper.make_node("Identity", [last], [f"id{i}"]))
            last = f"id{i}"


def nested(model: onnx.ModelProto, rng: Rng) -> None:
    """Ifs within Ifs, as deep as can be parsed or deeper."""
    inner = helper.make_graph(
        [helper.make_node("Constant", [], ["deep0"], value_float=1.0)],
        "leaf",
        [],
        [helper.make_tensor_value_info("deep0", 1, None)],
    )
    for level in range(1, int(pick(rng, (5, 12, 24, 30)))):
        leaf = helper.make_graph(
            [helper.make_node("Constant", [], [f"leaf{level}"], value_float=1.0)],
            "other",
            [],
            [helper.make_tensor_value_info(f"leaf{level}", 1, None)],
        )
        node = helper.make_node(
            "If", ["deep_go"], [f"deep{level}"], then_branch=inner, else_branch=leaf
        )
        inner = helper.make_graph(
            [node], f"g{level}", [], [helper.make_tensor_value_info(f"deep{level}", 1, None)]
        )
    model.graph.initializer.append(helper.make_tensor("deep_go", TensorProto.BOOL, [], [True]))
    model.graph.node.extend(inner.node)


def explosion(model: onnx.ModelProto, rng: Rng) -> None:
    """Functions that call functions: billions of nodes, or without end."""
    depth, breadth = int(pick(rng, (3, 8, 14, 40))), int(pick(rng, (2, 3, 10)))
    change = int(rng.integers(5))
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("boom", 1)]
    for level in range(depth):
        target = f"f{level + 1}" if level + 1 < depth else "f0" if change == 0 else None
        nodes, last = [], "a"
        for i in range(breadth):
            out = "b" if i == breadth - 1 else f"t{i}"
            inner = helper.make_node(
                target or "Relu", [last], [out], domain="boom" if target else ""
            )
            nodes.append(inner)
            last = out
        model.functions.append(
            helper.make_function("boom", f"f{level}", ["a"], ["b"], nodes, imports)
        )
    model.opset_import.add(domain="boom", version=1)
    if model.graph.input:
        source = model.graph.input[0].name
        model.graph.node.append(helper.make_node("f0", [source], ["boomed"], domain="boom"))
        if change == 1:
            model.graph.output.add(name="boomed")
    if change == 2:  # a function by the name of a standard operator
        model.functions[0].domain, model.functions[0].name = "", "MatMul"
    if change == 3:
        model.functions.append(model.functions[0])


def endless(model: onnx.ModelProto, rng: Rng) -> None:
    """A Loop that goes on for ever, or stacks up without bound."""
    scan = rng.random() < 0.5
    outputs = [helper.make_tensor_value_info("l_go", TensorProto.BOOL, [])]
    outputs.append(helper.make_tensor_value_info("l_out", 1, None))
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["l_in"], ["l_go"]),
            helper.make_node("RandomNormal", [], ["l_out"], shape=[pick(rng, (1, 1000, 10**6))]),
        ],
        "body",
        [
            helper.make_tensor_value_info("l_i", TensorProto.INT64, []),
            helper.make_tensor_value_info("l_in", TensorProto.BOOL, []),
            *([] if scan else [helper.make_tensor_value_info("l_state", 1, None)]),
        ],
        outputs,
    )
    times = pick(rng, (10**4, 10**9, 2**62))
    model.graph.initializer.append(helper.make_tensor("l_times", TensorProto.INT64, [], [times]))
    model.graph.initializer.append(helper.make_tensor("l_true", TensorProto.BOOL, [], [True]))
    model.graph.initializer.append(helper.make_tensor("l_start", 1, [1], [0.0]))
    inputs = ["l_times", "l_true", *([] if scan else ["l_start"])]
    model.graph.node.append(helper.make_node("Loop", inputs, ["looped"], "endless", body=body))
    model.graph.output.append(helper.make_tensor_value_info("looped", 1, None))


def gigantic(model: onnx.ModelProto, rng: Rng) -> None:
    """A few bytes that ask for gigabytes: constants that are filled, tiled, padded, enlarged."""
    size = [int(pick(rng, (2**15, 2**20, 2**34, 2**40))) for _ in range(int(rng.integers(1, 4)))]
    model.graph.initializer.append(helper.make_tensor("g_size", 7, [len(size)], size))
    model.graph.initializer.append(helper.make_tensor("g_one", 1, [1] * len(size), [1.0]))
    model.graph.initializer.append(
        helper.make_tensor("g_pads", 7, [2 * len(size)], [0] * len(size) + size)
    )
    model.graph.initializer.append(helper.make_tensor("g_zero", 7, [], [0]))
    model.graph.initializer.append(helper.make_tensor("g_step", 7, [], [1]))
    model.graph.initializer.append(helper.make_tensor("g_last", 7, [], [size[0] ** 2 % 2**62]))
    scales = helper.make_tensor("g_scales", 1, [len(size)], [float(s) for s in size])
    model.graph.initializer.append(scales)
    node = pick(
        rng,
        (
            helper.make_node("ConstantOfShape", ["g_size"], ["g_y"]),
            helper.make_node("Expand", ["g_one", "g_size"], ["g_y"]),
            helper.make_node("Tile", ["g_one", "g_size"], ["g_y"]),
            helper.make_node("Pad", ["g_one", "g_pads"], ["g_y"]),
            helper.make_node("Range", ["g_zero", "g_last", "g_step"], ["g_y"]),
            helper.make_node("Resize", ["g_one", "", "g_scales"], ["g_y"]),
            helper.make_node("RandomNormal", [], ["g_y"], shape=size),
        ),
    )
    model.graph.node.insert(0, node)
    model.graph.output.append(helper.make_tensor_value_info("g_y", 1, None))
