"""Execution providers of ONNX Runtime: their names, libraries and options."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from onnxlr.errors import RuntimeMissingError, UsageError
from onnxlr.system.runtime import import_runtime, runtime_reason

CPU = "cpu"
Options = tuple[tuple[str, tuple[tuple[str, str], ...]], ...]  # pairs, by a provider's short name
Libraries = tuple[tuple[str, str], ...]  # names and absolute paths

_SUFFIX = "executionprovider"
_IN_PLACE = "in place of onnxruntime"
_BY_LIBRARY = "name its library with --provider-library NAME=PATH"
# How one gets what this runtime wasn't built with.
_REMEDIES = {
    "cuda": "pip install 'onnxlr[cuda]' in place of 'onnxlr[cpu]'",
    "tensorrt": "pip install 'onnxlr[cuda]' in place of 'onnxlr[cpu]', and NVIDIA's TensorRT",
    "openvino": "pip install 'onnxlr[openvino]' in place of 'onnxlr[cpu]'",
    "dml": f"pip install onnxruntime-directml {_IN_PLACE}, on Windows",
    "coreml": "the package of ONNX Runtime for macOS has it",
    "migraphx": f"pip install onnxruntime-migraphx {_IN_PLACE}, beside AMD's ROCm",
    "cann": f"pip install onnxruntime-cann {_IN_PLACE}, beside Huawei's CANN",
    "nvtensorrtrtx": f"pip install onnxruntime-ep-nv-tensorrt-rtx, and {_BY_LIBRARY}",
    "webgpu": f"pip install onnxruntime-ep-webgpu, and {_BY_LIBRARY}",
    "qnn": f"pip install onnxruntime-qnn, and {_BY_LIBRARY}",
}
# Options for the number of threads, of providers that don't take the session's.
_THREADS = {
    "openvino": "num_of_threads",
    "xnnpack": "intra_op_num_threads",
}
_registered: dict[tuple[str, str], tuple[str, ...]] = {}  # in this process, and what each offers


def short_name(name: str) -> str:
    """What a provider is called here.

    >>> short_name("OpenVINOExecutionProvider"), short_name("CPU")
    ('openvino', 'cpu')
    """
    return name.strip().lower().removesuffix(_SUFFIX)


def parse_libraries(texts: Sequence[str]) -> Libraries:
    """Libraries from NAME=PATH, each of which is there.

    Raises
    ------
    UsageError
        If a text has another form.
    RuntimeMissingError
        If there is no such file.
    """
    libraries = []
    for text in texts:
        name, _, path = text.partition("=")
        if not name.strip() or not path.strip():
            raise UsageError(
                f"--provider-library {text!r} names no library: give NAME=PATH, such as "
                "webgpu=/opt/libonnxruntime_providers_webgpu.so"
            )
        libraries.append((name.strip(), str(_file(path.strip()))))
    return tuple(libraries)


def _file(path: str) -> Path:
    try:
        if Path(path).is_file():
            return Path(path).absolute()
    except (OSError, ValueError):  # no name that a disk could hold
        pass
    raise RuntimeMissingError(
        f"--provider-library: there is no file {path}: give the path of the provider's library"
    )


def parse_providers(texts: Sequence[str], libraries: Libraries) -> tuple[str, ...]:
    """Short names of providers, in order; each text holds one, or several between commas.

    Raises
    ------
    UsageError
        If this ONNX Runtime knows no such provider, one is named twice, or none that a library
        offers is named.
    RuntimeMissingError
        If no runtime is installed, or a library can't be used.
    """
    names = tuple(short_name(part) for text in texts for part in text.split(","))
    offers = [_register(*library) for library in libraries]
    if names == (CPU,) and not libraries:  # which needs no runtime to be known
        return names
    known = _by_short_name(_known())
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, 1)
            raise UsageError(
                f"--provider {name!r} is unknown{f', {near[0]} is near' if near else ''}: ONNX "
                f"Runtime {import_runtime().__version__} offers {_words(_offered())} here"
            )
        if names.count(name) > 1:
            raise UsageError(f"--provider names {name} twice: name each once, in their order")
    for (name, path), offered in zip(libraries, offers, strict=True):
        if not {short_name(full) for full in offered} & set(names):
            raise UsageError(
                f"--provider-library {name}={path} offers {_words(offered)}: choose it with "
                "--provider"
            )
    return names


def parse_options(texts: Sequence[str], names: Sequence[str]) -> Options:
    """Options from KEY=VALUE for the first of these providers, and NAME:KEY=VALUE for any.

    Raises
    ------
    UsageError
        If a text has another form, or is for a provider that isn't named.

    Examples
    --------
    >>> parse_options(["device_type=CPU", "cuda:device_id=1"], ["openvino", "cuda"])
    (('openvino', (('device_type', 'CPU'),)), ('cuda', (('device_id', '1'),)))
    """
    found: dict[str, dict[str, str]] = {}
    for text in texts:
        left, equals, value = text.partition("=")
        owner, colon, key = left.rpartition(":")
        name = short_name(owner) if colon else names[0]
        if not equals or not key.strip():
            raise UsageError(
                f"--provider-option {text!r} isn't KEY=VALUE: give that for the first provider, "
                "NAME:KEY=VALUE for another"
            )
        if name not in names:
            raise UsageError(
                f"--provider-option {text!r} is for {name}, and --provider names "
                f"{', '.join(names)}: name it there, or leave the option out"
            )
        found.setdefault(name, {})[key.strip()] = value
    return tuple((name, tuple(found[name].items())) for name in names if name in found)


def check_offered(names: Sequence[str], libraries: Libraries) -> list[str]:
    """ONNX Runtime's names for providers, which it must offer here.

    Raises
    ------
    RuntimeMissingError
        If no runtime is installed, or it was built without one of them.
    """
    runtime = import_runtime()
    for library in libraries:
        _register(*library)
    offered, known = _by_short_name(_offered()), _by_short_name(_known())
    for name in names:
        if name not in offered:
            remedy = _REMEDIES.get(name, f"install a build that has it, or {_BY_LIBRARY}")
            raise RuntimeMissingError(
                f"this ONNX Runtime ({runtime.__version__}) has no {known.get(name, name)}: "
                f"{remedy}"
            )
    return [offered[name] for name in names]


def give_providers(
    settings: Any, chosen: Sequence[str], options: Mapping[str, Mapping[str, str]]
) -> dict[str, Any]:
    """Have a session take these providers, in order.

    Parameters
    ----------
    settings : onnxruntime.SessionOptions
    chosen : sequence of str
        ONNX Runtime's names.
    options : mapping of str to mapping
        By short name.

    Returns
    -------
    dict
        What the session is to be opened with besides.
    """
    runtime = import_runtime()
    built_in = runtime.get_available_providers()
    pairs = [(name, dict(options.get(short_name(name), {}))) for name in chosen]
    if all(name in built_in for name in chosen):
        return {"providers": pairs}
    for name, values in pairs:
        if name not in built_in:
            devices = [d for d in runtime.get_ep_devices() if d.ep_name == name]
            settings.add_provider_for_devices(devices, values)
        elif short_name(name) != CPU:  # which every session has, as its last
            settings.add_provider(name, values)
    return {}


def thread_options(name: str, threads: int) -> dict[str, str]:
    """The option by which a provider with threads of its own gets their number."""
    return {_THREADS[name]: str(threads)} if name in _THREADS else {}


def _register(name: str, path: str) -> tuple[str, ...]:
    """Register a library in this process, once; returns the providers that it offers here."""
    if (name, path) not in _registered:
        runtime = import_runtime()
        if not hasattr(runtime, "register_execution_provider_library"):
            raise RuntimeMissingError(
                f"ONNX Runtime {runtime.__version__} takes no --provider-library: install 1.23 or "
                "newer"
            )
        before = len(runtime.get_ep_devices())
        try:
            runtime.register_execution_provider_library(name, path)
        except Exception as error:
            raise RuntimeMissingError(
                f"ONNX Runtime {runtime.__version__} can't use {path} as a library of a provider: "
                f"{runtime_reason(error)}"
            ) from None
        fresh = runtime.get_ep_devices()[before:]
        _registered[name, path] = tuple(sorted({device.ep_name for device in fresh}))
    if not _registered[name, path]:
        raise RuntimeMissingError(
            f"the provider library {path} was loaded and offers nothing: it finds no device on "
            "this machine that it works on"
        )
    return _registered[name, path]


def _known() -> list[str]:
    """Providers that ONNX Runtime has a name for, built in or not, and those of libraries."""
    return [*import_runtime().get_all_providers(), *_offered()]


def _offered() -> list[str]:
    """Providers that are built in, and those of libraries that were registered."""
    runtime = import_runtime()
    devices = runtime.get_ep_devices() if hasattr(runtime, "get_ep_devices") else []
    return [*runtime.get_available_providers(), *(device.ep_name for device in devices)]


def _by_short_name(names: Sequence[str]) -> dict[str, str]:
    return {short_name(name): name for name in names}


def _words(names: Sequence[str]) -> str:
    return ", ".join(sorted({short_name(name) for name in names}))
