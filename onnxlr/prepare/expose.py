"""Models that give out values from within, besides their outputs."""

from collections.abc import Iterable

import onnx
import onnx_ir as ir

from onnxlr.model.load import Source
from onnxlr.model.protobuf import serialize, to_proto
from onnxlr.system.session import Machine, Session, open_exposed


def session_with_outputs(
    model: ir.Model, names: Iterable[str], machine: Machine, source: Source
) -> Session:
    """A session of a model, made from a source, that gives out values besides its outputs."""
    return open_exposed(
        model_with_outputs(model, names, source), machine, source.label, source.folder
    )


def model_with_outputs(model: ir.Model, names: Iterable[str], source: Source) -> bytes:
    """The model of ``session_with_outputs``."""
    proto = to_proto(model)
    fed = {v.name for v in proto.graph.input} - {t.name for t in proto.graph.initializer}
    present = fed | {v.name for v in proto.graph.output}
    proto.graph.output.extend(
        onnx.ValueInfoProto(name=n) for n in sorted(names) if n not in present
    )
    return serialize(proto, source.label)
