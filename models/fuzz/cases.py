"""Hostile inputs by number: the files of a case, and the commands that are run on them."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from models.fuzz.basics import NUMBERS, Rng, pick
from models.fuzz.fields import scramble
from models.fuzz.recipes import RECIPES
from tests.support.hostile_seeds import SEEDS, externalize, mlp

IN, OUT = "in.onnx", "out.onnx"
_QUIET = ("--quiet", "--jobs", "1")
_UNTIMED = (*_QUIET, "--no-measure")
COMMANDS: dict[str, tuple[str, ...]] = {
    "inspect": ("inspect", IN, "--quiet"),
    "none": ("optimize", IN, OUT, "--rank", "exact", "--verify", "none", *_QUIET),
    "full": ("optimize", IN, OUT, "--rank", "0.5", *_QUIET),
    "auto": ("optimize", IN, OUT, *_UNTIMED),
    "layers": ("optimize", IN, OUT, "--rank", "4", "--verify", "layers", *_UNTIMED),
    "expand": ("optimize", IN, OUT, "--expand-at-load", "--rank", "exact", *_UNTIMED),
    "named": (
        *("optimize", IN, OUT, "--method", "tiled-svd,cp3,slice-svd", "--rank", "0.3"),
        *("--verify", "none", *_QUIET),
    ),
    "plan": (
        "optimize",
        IN,
        OUT,
        "--rank",
        "4",
        "--verify",
        "none",
        "--plan-out",
        "p.json",
        *_QUIET,
    ),
    "apply": ("apply", "p.json", IN, OUT, "--quiet"),
    "compare": ("compare", IN, "good.onnx", "--json", "c.json"),
    "compared": ("compare", "good.onnx", IN, "--json", "c.json"),
    "bench": ("bench", IN, "--seconds", "0.02", "--json", "b.json"),
    "data": ("optimize", IN, OUT, "--data", "data.npz", *_UNTIMED),
    "npy": ("optimize", IN, OUT, "--data", "data.npy", *_UNTIMED),
    "table": ("optimize", IN, OUT, "--latency-table", "table.json", *_QUIET),
}
_OF_MODELS = ("none", "full", "auto", "layers", "expand", "named", "compare", "compared", "bench")


@dataclass
class Case:
    """Files to lay out, and commands to run on them in turn.

    Attributes
    ----------
    kind : str
        What the table counts it as.
    files : dict of str to bytes
    commands : list of str
        Keys of ``COMMANDS``.
    links : dict of str to str
        Symbolic links by name.
    cache : bool
        Whether the commands have a cache folder, ``cache``.
    """

    kind: str
    files: dict[str, bytes]
    commands: list[str]
    links: dict[str, str] = field(default_factory=dict)
    cache: bool = False


@dataclass(frozen=True)
class Sound:
    """Files of runs that went well, which are broken in the cases that keep the model sound."""

    plan: bytes
    table: bytes
    cache: dict[str, bytes]


def make_case(seed: int, number: int, sound: Sound) -> Case:
    """Return the case of this number; it is always the same."""
    rng = np.random.default_rng([seed, number])
    makers: tuple[tuple[Callable[[Rng, Sound], Case], float], ...] = (
        *((_of_bytes, 0.16), (_of_fields, 0.28), (_of_graph, 0.32), (_of_external, 0.07)),
        *((_of_plan, 0.05), (_of_data, 0.06), (_of_table, 0.03), (_of_cache, 0.03)),
    )
    shares = np.array([share for _, share in makers])
    return makers[int(rng.choice(len(makers), p=shares / shares.sum()))][0](rng, sound)


def _seed_model(rng: Rng) -> onnx.ModelProto:
    model: onnx.ModelProto = pick(rng, list(SEEDS.values()))()
    return model


def _commands(rng: Rng) -> list[str]:
    chosen = ["inspect", *rng.choice(_OF_MODELS, 2, replace=False)]
    return [*chosen, "plan", "apply"] if rng.random() < 0.1 else chosen


def _model_case(kind: str, data: bytes, rng: Rng, **files: bytes) -> Case:
    good = mlp().SerializeToString()
    return Case(kind, {IN: data, "good.onnx": good} | files, _commands(rng))


def _of_bytes(rng: Rng, _: Sound) -> Case:
    data = _seed_model(rng).SerializeToString()
    other = _seed_model(rng).SerializeToString()
    return _model_case("model: bytes", mutate_bytes(data, other, rng), rng)


def _of_fields(rng: Rng, _: Sound) -> Case:
    model = _seed_model(rng)
    scramble(model, rng)
    return _model_case("model: fields", _serialized(model), rng)


def _of_graph(rng: Rng, _: Sound) -> Case:
    model = _seed_model(rng)
    names = list(RECIPES)
    chosen = [str(pick(rng, names)) for _ in range(1 if rng.random() < 0.7 else 2)]
    for name in chosen:
        RECIPES[name](model, rng)
    return _model_case(f"model: {chosen[0]}", _serialized(model), rng)


def _serialized(model: onnx.ModelProto) -> bytes:
    # Protobuf's Python face takes no text but UTF-8; a file may hold any.
    return bytes(model.SerializeToString().replace(b"\x01\x02\x03", b"\xff\xfe\x80"))


def _of_external(rng: Rng, _: Sound) -> Case:
    """Return a case with weights in another file: short, elsewhere, overlapping, or a link."""
    model = _seed_model(rng)
    content = externalize(model)
    if rng.random() < 0.3:
        scramble(model, rng)
    tensors = [t for t in model.graph.initializer if t.external_data]
    entries = [e for t in tensors for e in t.external_data]
    values = (
        *("../in.data", "/etc/passwd", "in.onnx", ".", "", "gone", "sub/../in.data", "a:b", "\0"),
        *("link", "in.data/", "x" * 300, *map(str, NUMBERS), "1e3", "0x10", " 4", "٣", "9" * 5000),
    )
    for entry in entries:
        if rng.random() < 1.5 / max(1, len(entries)):
            field_ = "key" if rng.random() < 0.15 else "value"
            setattr(entry, field_, pick(rng, ("offset", "location", *values)))
    if rng.random() < 0.3:
        content = content[: int(rng.integers(len(content) + 1))]
    if rng.random() < 0.1:
        content = mutate_bytes(content, content, rng)
    case = _model_case("external data", _serialized(model), rng, **{"in.data": content})
    if rng.random() < 0.15:
        del case.files["in.data"]
    case.links = {"link": pick(rng, ("/etc/passwd", "in.data", "link", "gone", "/dev/zero"))}
    if rng.random() < 0.1 and "in.data" in case.files:
        case.files["sub/in.data"] = case.files.pop("in.data")
        case.links["in.data"] = "sub/in.data"
    return case


def _of_plan(rng: Rng, sound: Sound) -> Case:
    plan = _mutate_json(sound.plan, rng)
    files = {IN: mlp().SerializeToString(), "p.json": plan}
    return Case("plan", files, ["apply"])


def _of_table(rng: Rng, sound: Sound) -> Case:
    files = {IN: mlp().SerializeToString(), "table.json": _mutate_json(sound.table, rng)}
    return Case("latency table", files, ["table"])


def _of_cache(rng: Rng, sound: Sound) -> Case:
    files = {f"cache/{name}": data for name, data in sound.cache.items()}
    for name in files:
        if rng.random() < 0.5:
            change = _mutate_json if name.endswith(".json") else _mutate_archive
            files[name] = change(files[name], rng)
    files |= {IN: mlp().SerializeToString(), "data.npz": _archive(x=_samples())}
    return Case("cache", files, ["data", "table"], cache=True)


class _Canary:
    """Leaves the file ``unpickled`` if it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path("unpickled").touch, ()


def _of_data(rng: Rng, _: Sound) -> Case:
    change, command = int(rng.integers(6)), "data"
    content = _archive(x=_samples())
    if change == 0:
        content = mutate_bytes(content, content, rng)
    elif change == 1:
        content = _mutate_archive(content, rng)
    elif change == 2:
        content = _npz({"x.npy": _header("|O", (4, 24)) + pickle.dumps(_Canary())})
    elif change == 3:
        shape = tuple(pick(rng, NUMBERS) for _ in range(int(rng.integers(0, 4))))
        content = _npz(
            {"x.npy": _header(pick(rng, ("<f4", "|O", "<U9", "<c16")), shape) + b"\0" * 99}
        )
    else:
        command = "npy"
        shape = (4, 24) if change == 4 else tuple(pick(rng, NUMBERS) for _ in range(2))
        content = _header("<f4" if change == 4 else "|O", shape) + _samples().tobytes()
        content = mutate_bytes(content, content, rng) if rng.random() < 0.7 else content
    files = {IN: mlp().SerializeToString(), f"data.{'npy' if command == 'npy' else 'npz'}": content}
    return Case("samples", files, [command])


def _samples() -> NDArray[np.float32]:
    return np.random.default_rng(3).standard_normal((12, 24)).astype(np.float32)


def _archive(**arrays: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    return file.getvalue()


def _header(descr: str, shape: tuple[int, ...]) -> bytes:
    text = repr({"descr": descr, "fortran_order": False, "shape": shape}).ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def _npz(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def _mutate_archive(data: bytes, rng: Rng) -> bytes:
    """Break an array within a sound archive, or exchange it."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = pick(rng, list(members))
    change = int(rng.integers(5))
    if change == 0:
        members[name] = mutate_bytes(members[name], members[name], rng)
    elif change == 1:
        shape = tuple(pick(rng, NUMBERS) for _ in range(int(rng.integers(0, 3))))
        members[name] = _header("<f8", shape) + members[name][128:]
    elif change == 2:
        members[name] = _header("|O", (2,)) + pickle.dumps(_Canary())
    elif change == 3:
        odd = np.full((3, 3), pick(rng, (np.nan, np.inf, 0, -1)), np.float64)
        file = io.BytesIO()
        np.save(file, odd)
        members[name] = file.getvalue()
    else:
        members[f"{name}/../x.npy"] = members.pop(name)
    return _npz(members)


_VALUES: tuple[Any, ...] = (
    *(None, True, "", "x", -1, 0, 1, 4, 10**30, 1.5, -1e308, [], {}, [[]], [None], {"a": 1}),
    *("svd", "expand-at-load", "auto", "a" * 100_000, [10**9], [4, 4], float("nan"), float("inf")),
)


def _mutate_json(data: bytes, rng: Rng) -> bytes:
    """Change bytes of a JSON file, or values within it."""
    if rng.random() < 0.25:
        return mutate_bytes(data, data, rng)
    content = json.loads(data)
    for _ in range(int(rng.integers(1, 4))):
        _change(content, rng)
    return json.dumps(content).encode()


def _change(content: Any, rng: Rng) -> None:
    """Replace, remove or add one value somewhere within."""
    place: Any = content
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return
        key = pick(rng, keys)
        inner = place[key]
        if isinstance(inner, (dict, list)) and inner and rng.random() < 0.8:
            place = inner
            continue
        change = rng.random()
        if change < 0.15:
            del place[key]
        elif change < 0.25 and isinstance(place, dict):
            place[pick(rng, ("extra", "", "4", "-1", "0", "1e3", "9" * 5000))] = inner
        else:
            place[key] = pick(rng, _VALUES)
        return


def mutate_bytes(data: bytes, other: bytes, rng: Rng) -> bytes:
    """Flip, cut, double, insert, overwrite or splice, a few times."""
    mutant = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        if not mutant:
            break
        at = int(rng.integers(len(mutant)))
        size = int(2 ** rng.uniform(0, np.log2(len(mutant))))
        change = int(rng.integers(8))
        if change == 0:
            mutant[at] ^= 1 << int(rng.integers(8))
        elif change == 1:
            mutant[at] = int(rng.integers(256))
        elif change == 2:
            del mutant[at : at + size]
        elif change == 3:
            mutant[at:at] = mutant[at : at + size]
        elif change == 4:
            mutant[at:at] = rng.bytes(int(rng.integers(1, 9)))
        elif change == 5:
            mutant = mutant[: at + 1]
        elif change == 6:
            start = int(rng.integers(max(1, len(other))))
            mutant[at : at + size] = other[start : start + size]
        else:  # a varint, of a length or a number, grows
            mutant[at : at + 1] = bytes(
                [0xFF] * int(rng.integers(1, 10)) + [int(rng.integers(128))]
            )
    return bytes(mutant)
