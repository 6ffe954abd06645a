"""The backend tests of the ``onnx`` package, every model of them through ``optimize``.

``python -m models.conformance`` takes every single-operator and small model, the light CNNs, and
small networks, converted to opsets from 7 to the newest. Each goes through ``optimize`` and
``apply`` in several ways, and what comes out is held against what went in
(``models.conformance.trial``). It ends with an error if a promise is broken.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import click
import onnx
import onnx.version_converter
import onnxruntime

from models.conformance.cases import Case, constant_weights, data_cases, light_cases, node_cases
from models.conformance.nets import net_cases
from models.conformance.trial import ALWAYS, REFUSED, WAYS, BrokenError, Trial
from models.reference.files import replace_file, tell_table
from onnxlr.errors import OnnxlrError, one_line

VERDICTS = ("factorized", "kept", "plain", "refused", "unconvertible", "failed")
_SECONDS = 900  # that a model may take


@dataclass(frozen=True)
class Outcome:
    """The result of a model in one way, or in all ways if ``way`` is empty.

    Attributes
    ----------
    verdict : str
        ``factorized`` (and equal), ``kept`` (a reason for every layer), ``plain`` (no weight of a
        heavy operator: the output is the input), ``refused`` (in one line), ``unconvertible`` (by
        ONNX's version converter) or ``failed``.
    note : str
        The refusal or the fault.
    """

    name: str
    group: str
    opset: int
    way: str
    verdict: str
    replaced: int = 0
    layers: int = 0
    note: str = ""


def check(case: Case) -> list[Outcome]:
    """Return the outcomes of a case in each of its ways, in this process."""
    material = case.make()
    said = Outcome(case.name, case.group, case.opset or _opset(material.model), "", "")
    if case.opset is not None:
        try:
            converted = onnx.version_converter.convert_version(material.model, case.opset)
        except Exception as error:  # it raises whatever it trips over
            return [replace(said, verdict="unconvertible", note=one_line(error))]
        material = replace(material, model=converted)
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("error")  # onnxlr has no business warning
        trial = Trial(case, material, Path(name))
        ways = case.ways or (ALWAYS if trial.weights else ("drop",))
        return [_outcome(trial, way, replace(said, way=way)) for way in ways]


def _outcome(trial: Trial, way: str, said: Outcome) -> Outcome:
    try:
        replaced, layers = WAYS[way](trial)
    except REFUSED as error:
        return replace(said, verdict="refused", note=str(error).replace(str(trial.path), "<model>"))
    except (BrokenError, OnnxlrError) as error:
        return replace(said, verdict="failed", note=str(error))
    except Exception as error:  # anything else is a failure too, and tells where
        return replace(said, verdict="failed", note=_whence(error))
    verdict = "factorized" if replaced else "kept" if layers or trial.weights else "plain"
    return replace(said, verdict=verdict, replaced=replaced, layers=layers)


def _whence(error: Exception) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}: {error}"


def _opset(model: onnx.ModelProto) -> int:
    return next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)


def check_apart(case: Case, seconds: float = _SECONDS) -> list[Outcome]:
    """Return the outcomes of ``check`` in a child process, which may crash or hang."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=_send, args=(case, theirs))
    child.start()
    theirs.close()
    said = Outcome(case.name, case.group, case.opset or 0, "", "failed")
    try:
        if ours.poll(seconds):
            return list(ours.recv())
        child.kill()
        return [replace(said, note=f"not done in {seconds} s")]
    except EOFError:
        child.join()
        return [replace(said, note=f"the process ended with {child.exitcode}")]
    finally:
        child.join()


def _send(case: Case, connection: Connection) -> None:
    try:
        outcomes = check(case)
    except Exception as error:  # a fault of the check, not of onnxlr
        said = Outcome(case.name, case.group, case.opset or 0, "", "failed")
        outcomes = [replace(said, note=f"the check itself: {_whence(error)}")]
    connection.send(outcomes)


def together(outcomes: Sequence[Outcome]) -> Outcome:
    """Return the outcome of all ways together: the worst news first, then a factorization."""
    for verdict in ("failed", "factorized", "refused", "unconvertible", "kept", "plain"):
        some = [o for o in outcomes if o.verdict == verdict]
        if some:
            notes = "; ".join(dict.fromkeys(f"{o.way}: {o.note}" for o in some if o.note))
            replaced = sum(o.replaced for o in some)
            return replace(some[0], way="", note=notes, replaced=replaced)
    raise ValueError("no outcome")


def runtime_opset() -> int:
    """Return the newest opset that this ONNX Runtime reads."""
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    other = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "g", [value], [other])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    for opset in range(onnx.defs.onnx_opset_version(), 7, -1):
        model = onnx.helper.make_model(
            graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8
        )
        try:
            onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception:  # noqa: S112 - the next older one, then
            continue
        return opset
    return 7


def all_opsets() -> tuple[int, ...]:
    """Return the opsets to convert to, with the newest of the runtime and the newest of ONNX."""
    newest = onnx.defs.onnx_opset_version()
    return tuple(
        sorted({o for o in (7, 9, 11, 13, 17, 21) if o <= newest} | {runtime_opset(), newest})
    )


def all_cases(models: str, opsets: Sequence[int]) -> Iterator[Case]:
    """Yield the cases of ``--models``."""
    if models in ("data", "all"):
        yield from node_cases()
        for case in data_cases():
            yield case
            if constant_weights(case.make().model):
                yield from (replace(case, opset=opset) for opset in opsets)
        yield from net_cases(opsets)
    if models in ("light", "all"):
        yield from light_cases(opsets)


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the counts by group and opset, the kinds of refusals, and every failure."""
    lines = []
    converted = [o for o in outcomes if o.group != "node"]
    for title, rows, field in (
        ("group", outcomes, "group"),
        ("opset, without single operators", converted, "opset"),
    ):
        lines += [
            f"| {title} | models | {' | '.join(VERDICTS)} |",
            "| --- |" + " ---: |" * (len(VERDICTS) + 1),
        ]
        for value in sorted({getattr(o, field) for o in rows}):
            counts = Counter(o.verdict for o in rows if getattr(o, field) == value)
            cells = " | ".join(str(counts[v]) for v in VERDICTS)
            lines.append(f"| {value} | {sum(counts.values())} | {cells} |")
        lines.append("")
    for verdict in ("refused", "unconvertible"):
        kinds = Counter(_kind(o.note) for o in outcomes if o.verdict == verdict)
        lines += [f"{count} {verdict}: {kind}" for kind, count in kinds.most_common()]
    lines += [
        f"FAILED {o.group} {o.name} at opset {o.opset}: {o.note}"
        for o in outcomes
        if o.verdict == "failed"
    ]
    return lines


def _kind(note: str) -> str:
    """Return a refusal without its names and numbers, so that its kind can be counted."""
    first = re.sub(r"^\w+: ", "", note.split("; ")[0])
    first = re.sub(r"'[^']*'|\"[^\"]*\"|\([^)]*\)|\[[^\]]*\]", "…", first)
    return re.sub(r"\b[\w./-]*\d[\w./-]*\b", "#", first)[:160]


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--out", type=click.Path(path_type=Path), help="JSON file of every outcome.")
@click.option("--markdown", type=click.Path(path_type=Path), help="File for the table.")
@click.option("--opset", type=int, multiple=True, help="Convert to these only.  [default: all]")
@click.option("--models", type=click.Choice(["light", "data", "all"]), default="all")
@click.option("--only", default="", help="Regular expression searched in groups and names.")
def main(
    out: Path | None, markdown: Path | None, opset: tuple[int, ...], models: str, only: str
) -> None:
    """Put the models of the backend tests through optimize, and count what became of them."""
    outcomes: list[Outcome] = []
    rows: list[Outcome] = []
    for case in all_cases(models, opset or all_opsets()):
        if not re.search(only, f"{case.group} {case.name}"):
            continue
        some = check_apart(case)
        outcomes += some
        rows.append(together(some))
        if rows[-1].verdict == "failed" or case.group in ("light", "networks"):
            at = "" if case.opset is None else f" at opset {case.opset}"
            click.echo(f"{case.group} {case.name}{at}: {rows[-1].verdict} {rows[-1].note}")
    versions = f"onnx {onnx.__version__}, ONNX Runtime {onnxruntime.__version__}"
    tell_table([versions, "", *table(rows)], markdown)
    if out is not None:
        replace_file(out, json.dumps([asdict(o) for o in outcomes], indent=1).encode())
    if any(row.verdict == "failed" for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
