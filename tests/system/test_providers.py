"""Execution providers: how they are named, what they are given, and what one refused says."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest

import onnxlr
from onnxlr.api.arguments import parse_machine
from onnxlr.errors import ModelError, RuntimeMissingError, UsageError
from onnxlr.options import Options, command_of
from onnxlr.system import providers
from onnxlr.system.deadline import trial_seconds
from onnxlr.system.engines import engine_options
from onnxlr.system.entries import find_entries, remove
from onnxlr.system.runtime import runtime_version
from onnxlr.system.session import Machine, Session
from onnxlr.verify.latency_file import describe

MLP = Path(__file__).parents[2] / "models" / "fashion-mlp.onnx"
OPENVINO, CUDA = "OpenVINOExecutionProvider", "CUDAExecutionProvider"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("cpu", "cpu"),
        ("OpenVINO", "openvino"),
        ("TensorrtExecutionProvider, CUDAEXECUTIONPROVIDER,cpu", "tensorrt,cuda,cpu"),
        (["tensorrt,cuda", "cpu"], "tensorrt,cuda,cpu"),
        (("dml",), "dml"),
    ],
)
def test_names_are_short_or_full_and_keep_their_order(
    names: str | Sequence[str], expected: str
) -> None:
    machine = parse_machine(names, 3)
    assert machine == Machine(expected, 3)
    assert machine.providers == tuple(expected.split(","))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"provider": "openvno"}, ("'openvno' is unknown, openvino is near", runtime_version())),
        ({"provider": "cpu,"}, ("'' is unknown", "cpu")),
        ({"provider": "cuda,cuda"}, ("cuda twice",)),
        ({"options": "device_type"}, ("'device_type'", "KEY=VALUE")),
        ({"options": "=3"}, ("'=3'", "KEY=VALUE")),
        ({"options": "cuda:device_id=1"}, ("is for cuda", "names cpu")),
        ({"libraries": "webgpu"}, ("'webgpu'", "NAME=PATH")),
        ({"libraries": "=a.so"}, ("NAME=PATH",)),
    ],
)
def test_what_makes_no_sense_is_wrong_usage(
    arguments: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(UsageError) as caught:
        parse_machine(**arguments)
    assert all(word in str(caught.value) for word in words)


def test_options_go_to_the_first_provider_or_to_the_one_that_is_named() -> None:
    given = ["fp16=1", "CUDAExecutionProvider:device_id=0", "path=a:b=c", "cuda:x="]
    machine = parse_machine("tensorrt,cuda", options=given)
    assert dict(machine.options) == {
        "tensorrt": (("fp16", "1"), ("path", "a:b=c")),
        "cuda": (("device_id", "0"), ("x", "")),
    }
    command = command_of(Options(machine=machine), "a.onnx", "b.onnx")
    assert command == (
        "onnxlr optimize a.onnx b.onnx --provider tensorrt,cuda --provider-option fp16=1 "
        "--provider-option path=a:b=c --provider-option cuda:device_id=0 --provider-option cuda:x="
    )


def test_what_this_runtime_lacks_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    for name, words in {
        "openvino": (OPENVINO, "pip install 'onnxlr[openvino]'"),
        "cuda": (CUDA, "pip install 'onnxlr[cuda]'"),
        "dml": ("DmlExecutionProvider", "onnxruntime-directml"),
        "acl": ("ACLExecutionProvider", "install a build that has it", "--provider-library"),
    }.items():
        with pytest.raises(RuntimeMissingError) as caught:
            Session(MLP, parse_machine(name))
        assert all(word in str(caught.value) for word in words)


def test_machines_of_before_have_the_keys_of_before() -> None:
    """In the cache, and as the machine of a latency table."""
    for machine in (Machine(), Machine("cuda", 2)):
        plain = f"Machine(provider={machine.provider!r}, threads={machine.threads})"
        assert repr(machine) == plain
        known = describe(machine)
        assert set(known) == {"processor", "cores", "onnxruntime", "provider", "threads"}
    with_option = parse_machine("openvino", options="device_type=CPU")
    assert repr(with_option) != repr(Machine("openvino"))
    known = describe(with_option)
    assert known["options"] == {"openvino": {"device_type": "CPU"}}
    assert known == json.loads(json.dumps(known))  # as it stands in the file


@pytest.fixture
def offers_all(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A runtime that offers every provider, and shows what a session would be opened with."""
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: onnxruntime.get_all_providers()
    )
    return monkeypatch


def given_to(patch: pytest.MonkeyPatch, machine: Machine) -> dict[str, dict[str, str]]:
    """The options by provider that a session of the shipped model gets."""
    seen: list[dict[str, Any]] = []

    class Raw:
        get_provider_graph_assignment_info: Any = None

        def __new__(cls, _: str, __: Any, **given: Any) -> Any:
            seen.append(given)
            raise RuntimeError("seen")

    patch.setattr(onnxruntime, "InferenceSession", Raw)
    with pytest.raises(ModelError, match="seen"):
        Session(MLP, machine)
    assert seen[0]["enable_fallback"] == 0
    return dict(seen[0]["providers"])


def test_threads_reach_providers_with_threads_of_their_own(offers_all: pytest.MonkeyPatch) -> None:
    offers_all.setenv("ONNXLR_CACHE", "off")
    given = given_to(offers_all, Machine("xnnpack,openvino,cpu", 3))
    assert given == {
        "XnnpackExecutionProvider": {"intra_op_num_threads": "3"},
        OPENVINO: {"num_of_threads": "3"},
        "CPUExecutionProvider": {},
    }
    named = parse_machine("openvino", 3, options=["num_of_threads=5", "device_type=CPU"])
    assert given_to(offers_all, named) == {
        OPENVINO: {"num_of_threads": "5", "device_type": "CPU"},
    }


def test_what_is_compiled_is_kept_by_file_unless_the_user_names_a_place(
    offers_all: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    offers_all.setenv("ONNXLR_CACHE", str(cache))
    (folder,) = [given_to(offers_all, Machine("openvino"))[OPENVINO]["cache_dir"]]
    assert given_to(offers_all, Machine("openvino"))[OPENVINO]["cache_dir"] == folder
    assert given_to(offers_all, Machine("openvino", 2))[OPENVINO]["cache_dir"] != folder
    assert Path(folder).parent == cache
    assert Path(folder).is_dir()
    named = parse_machine("openvino", options="cache_dir=mine")
    assert given_to(offers_all, named)[OPENVINO]["cache_dir"] == "mine"
    given = given_to(offers_all, Machine("tensorrt,cuda"))
    assert given[CUDA] == {}
    options = given["TensorrtExecutionProvider"]
    assert options["trt_engine_cache_enable"] == options["trt_timing_cache_enable"] == "True"
    assert options["trt_engine_cache_path"] != options["trt_timing_cache_path"]


def test_engines_are_of_one_content_with_its_external_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT finds an engine again by names, which files with other weights may share."""
    monkeypatch.setenv("ONNXLR_CACHE", str(tmp_path / "cache"))
    model, data = tmp_path / "m.onnx", tmp_path / ("w" * 200)
    entry = b"\n\x08location\x12" + bytes([200 & 127 | 128, 200 >> 7]) + b"w" * 200 + b"\x1a\x00"

    def place() -> str:
        return engine_options("openvino", str(model), "setup")["cache_dir"]

    model.write_bytes(b"one")
    first = place()
    model.write_bytes(b"two")
    assert place() != first
    model.write_bytes(b"one")
    assert place() == first
    model.write_bytes(entry)
    data.write_bytes(b"1")
    before = place()
    assert place() == before
    data.write_bytes(b"12")
    assert place() != before
    assert engine_options("openvino", b"in memory", "setup") == {}
    assert engine_options("cpu", str(model), "setup") == {}
    monkeypatch.setenv("ONNXLR_CACHE", "off")
    assert engine_options("openvino", str(model), "setup") == {}
    assert engine_options("tensorrt", str(model), "setup") == {}


def test_engines_make_room_among_themselves_and_are_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONNXLR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ONNXLR_CACHE_SIZE", "40KB")
    model, folders = tmp_path / "m.onnx", []
    for i in range(4):
        model.write_bytes(bytes([i]))
        folder = Path(engine_options("openvino", str(model), "")["cache_dir"])
        (folder / "engine.blob").write_bytes(bytes(4000))
        os.utime(folder, (i, i))
        folders.append(folder)
    assert [folder.exists() for folder in folders] == [False, True, True, True]
    entries = find_entries(tmp_path / "cache")
    assert [(e.kind, e.nbytes) for e in entries] == [("engines", 4000)] * 3
    assert remove(entries) == []
    assert find_entries(tmp_path / "cache") == []


def test_compiling_has_ten_times_as_long() -> None:
    assert Machine("openvino").compiles
    assert Machine("tensorrt,cuda,cpu").compiles
    assert not Machine("cuda,cpu").compiles
    assert not Machine().compiles
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ONNXLR_TRIAL")
        plain = trial_seconds(10**8)
        assert plain == pytest.approx(55)
        assert trial_seconds(10**8, compiles=True) == pytest.approx(550)
        patch.setenv("ONNXLR_TRIAL", "600")
        assert trial_seconds(10**8, compiles=True) == 600


class Plugins:
    """An ONNX Runtime that takes libraries, one of which offers a device of a new provider."""

    def __init__(self, patch: pytest.MonkeyPatch, offered: str | None = "Fast") -> None:
        self.calls: list[tuple[str, str]] = []
        self.devices: list[Any] = [SimpleNamespace(ep_name="CPUExecutionProvider")]
        self.offered = offered
        patch.setattr(onnxruntime, "get_ep_devices", lambda: list(self.devices), raising=False)
        patch.setattr(
            onnxruntime, "register_execution_provider_library", self.register, raising=False
        )
        patch.setattr(providers, "_registered", {})

    def register(self, name: str, path: str) -> None:
        self.calls.append((name, path))
        if self.offered is not None:
            self.devices.append(SimpleNamespace(ep_name=self.offered))


@pytest.fixture
def library(tmp_path: Path) -> Path:
    path = tmp_path / "libfast.so"
    path.write_bytes(b"no library at all")
    return path


def test_a_library_is_registered_once_in_each_process_and_its_devices_are_taken(
    monkeypatch: pytest.MonkeyPatch, library: Path
) -> None:
    plugins = Plugins(monkeypatch)
    machine = parse_machine("fast", libraries=f"mine={library}", options="level=2")
    assert machine.libraries == (("mine", str(library)),)
    monkeypatch.setattr(providers, "_registered", {})  # as in the child process
    taken: list[Any] = []

    class Settings:
        def add_provider_for_devices(self, devices: Sequence[Any], options: Any) -> None:
            taken.append(([d.ep_name for d in devices], options))

        def add_provider(self, name: str, options: Any) -> None:
            taken.append((name, options))

    names = ("fast", "azure", "cpu")
    monkeypatch.setattr(
        onnxruntime,
        "get_available_providers",
        lambda: ["AzureExecutionProvider", "CPUExecutionProvider"],
    )
    for _ in range(2):
        chosen = providers.check_offered(names, machine.libraries)
    assert plugins.calls == [("mine", str(library))] * 2
    assert providers.give_providers(Settings(), chosen, {"fast": {"level": "2"}}) == {}
    # The second registration added a second device: of a provider, all devices are taken.
    assert taken == [(["Fast", "Fast"], {"level": "2"}), ("AzureExecutionProvider", {})]


def test_a_library_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, library: Path) -> None:
    with pytest.raises(RuntimeMissingError, match=r"no file .*nothing\.so"):
        parse_machine(libraries=f"mine={library.parent / 'nothing.so'}")
    if hasattr(onnxruntime, "register_execution_provider_library"):
        with pytest.raises(RuntimeMissingError, match=r"can't use .*libfast\.so as a library"):
            parse_machine("fast", libraries=f"mine={library}")
    Plugins(monkeypatch, offered=None)
    with pytest.raises(RuntimeMissingError, match=r"libfast\.so was loaded.*finds no device"):
        parse_machine("fast", libraries=f"mine={library}")
    Plugins(monkeypatch)
    with pytest.raises(UsageError, match="offers fast: choose it with --provider"):
        parse_machine("cpu", libraries=f"mine={library}")
    Plugins(monkeypatch)
    with pytest.raises(UsageError, match=r"'fest' is unknown, fast is near.*offers .*fast"):
        parse_machine("fest", libraries=f"mine={library}")


def test_a_runtime_without_libraries_says_so(
    monkeypatch: pytest.MonkeyPatch, library: Path
) -> None:
    monkeypatch.setattr(providers, "_registered", {})
    monkeypatch.delattr(onnxruntime, "register_execution_provider_library", raising=False)
    with pytest.raises(RuntimeMissingError, match="takes no --provider-library"):
        onnxlr.bench(MLP, provider="fast", provider_library=f"mine={library}")
