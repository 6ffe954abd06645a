"""The pass that Olive runs: ``onnxlr.optimize`` on the ONNX model of a workflow.

Its parameters are the arguments of that function, with their types, defaults and words.
"""

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from inspect import cleandoc, signature
from operator import or_
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from olive.common.config_utils import ParamCategory, validate_config
from olive.data.config import DataConfig
from olive.model import ONNXModelHandler
from olive.model.utils import resolve_onnx_path
from olive.passes import Pass
from olive.passes.onnx.common import get_external_data_config, model_proto_to_olive_model
from olive.passes.pass_config import PassConfigParam

from onnxlr.api.functions import optimize
from onnxlr.errors import ModelError, UsageError
from onnxlr.system.providers import CPU, short_name

_LOGGER = logging.getLogger("olive.onnxlr")  # below Olive's, whose level and handlers hold for it
_BY_OLIVE = ("model", "out", "progress")  # what Olive gives, takes and shows
_SPELLED = {"json": "json_out"}  # the configurations are objects that have a method of that name
_DATA_SETS = {"data": "data_config", "validation": "validation_data_config"}
_HEADS_AND_WORDS = re.compile(r"((?:^\S.*\n)+)((?:^ +\S.*\n?)+)", re.MULTILINE)


class Onnxlr(Pass):
    """Replace heavy weights of an ONNX model by low-rank chains, verified and timed.

    Samples come from files, as ``data`` and ``validation``, or from data sets of the workflow, as
    ``data_config`` and ``validation_data_config``. The execution provider is that of Olive's
    accelerator unless ``provider`` names another.
    """

    @staticmethod
    def is_accelerator_agnostic(accelerator_spec: Any) -> bool:  # noqa: ARG004
        """Whether one result does for all accelerators: it does not, as speed differs."""
        return False

    @classmethod
    def _default_config(cls, accelerator_spec: Any) -> dict[str, Any]:
        words, hints = _parameter_words(), get_type_hints(optimize)
        params = {}
        for name, default in _arguments().items():
            type_, category = _type_of(hints[name])
            params[_SPELLED.get(name, name)] = PassConfigParam(
                type_=type_, default_value=default, category=category, description=words[name]
            )
        for name, by_name in _DATA_SETS.items():
            params[by_name] = PassConfigParam(
                type_=DataConfig | dict,
                description=f"Name of a data set of the workflow, in place of the file of {name}. "
                "If labels are named, they are what comes with its inputs.",
            )
        params["provider"].default_value = short_name(accelerator_spec.execution_provider or CPU)
        return {**params, **get_external_data_config()}

    def _run_for_config(self, model: Any, config: Any, output_model_path: str) -> Any:
        if not isinstance(model, ONNXModelHandler):
            raise ModelError(
                f"the pass Onnxlr takes ONNX models, not a {type(model).__name__}: put one before "
                "it that exports to ONNX, such as OnnxConversion"
            )
        given = {name: getattr(config, _SPELLED.get(name, name)) for name in _arguments()}
        for name, by_name in _DATA_SETS.items():
            given[name] = _samples(name, given[name], getattr(config, by_name), given["labels"])
        result = optimize(model.model_path, progress=_Log(), **given)
        _LOGGER.info("%s", result.report.verdict)
        path = resolve_onnx_path(output_model_path, Path(model.model_path).name)
        return model_proto_to_olive_model(result.model, path, config)


class _Log:
    """The stages of a run as lines of Olive's log."""

    @contextmanager
    def stage(
        self,
        description: str,
        total: int | None,  # noqa: ARG002
    ) -> Iterator[Callable[[str], None]]:
        _LOGGER.info("%s", description)
        yield lambda _: None

    def tell(self, line: str) -> None:
        _LOGGER.info("%s", line)


def _arguments() -> dict[str, Any]:
    """The arguments of ``optimize`` that are the user's, with their defaults."""
    parameters = signature(optimize).parameters
    return {name: p.default for name, p in parameters.items() if name not in _BY_OLIVE}


def _parameter_words() -> dict[str, str]:
    """What the documentation of ``optimize`` says of each argument."""
    section = cleandoc(optimize.__doc__ or "").partition("Parameters\n----------\n")[2]
    words = {}
    for heads, text in _HEADS_AND_WORDS.findall(section.partition("\n\n")[0]):
        for head in heads.splitlines():
            for name in head.partition(" : ")[0].split(", "):
                words[name] = " ".join(text.split())
    return words


def _type_of(hint: Any) -> tuple[Any, Any]:
    """What JSON may hold for an argument, and whether Olive has to take it for a path."""
    found = [kind for kind in get_args(hint) or (hint,) if kind is not NoneType]
    kinds = [kind for kind in found if kind in (bool, int, float, str)] or [str]
    if Sequence[str] in found:
        kinds.append(list[str])
    is_path = Path in found or any(get_origin(kind) is os.PathLike for kind in found)
    return reduce(or_, kinds), ParamCategory.PATH if is_path else ParamCategory.NONE


def _samples(name: str, file: str | None, data_set: Any, labels: str | None) -> Any:
    """The samples of an argument: a file, the batches of a data set, or None."""
    if data_set is None:
        return file
    if file is not None:
        raise UsageError(f"{name} and {_DATA_SETS[name]} are both given: name one of them")
    return _batches(data_set, labels)


def _batches(data_set: Any, labels: str | None) -> Iterator[Any]:
    """The batches of a data set of Olive's, which are pairs of inputs and labels."""
    container = validate_config(data_set, DataConfig).to_data_container()
    for inputs, label in container.create_dataloader():
        if labels is None:
            yield inputs
        elif isinstance(inputs, Mapping):
            yield {**inputs, labels: label}
        else:
            yield [inputs, label]
