"""Names in a graph."""

import numpy as np
import onnx_ir as ir

from onnxlr.model.graph import Names
from tests.support.builders import linear


def test_names_are_handed_out_once() -> None:
    names = Names(ir.from_proto(linear(np.ones((3, 3), np.float32), name="fc")))
    assert [names.unused(n) for n in ("fc", "w", "new", "new")] == ["fc_1", "w_1", "new", "new_1"]
