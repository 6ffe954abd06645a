"""Where providers that compile keep what they compiled, for the next time a file is opened."""

import contextlib
import hashlib
import re
from pathlib import Path

from onnxlr.system.cache import cache_place
from onnxlr.system.entries import ENGINES, beyond, find_entries, remove
from onnxlr.system.runtime import runtime_version

_SHARE = 4  # of the cache's size is for these: one part in so many
# The file of external data, as a tensor names it: its length in one byte or two, and the path.
_LOCATION = re.compile(rb"\n\x08location\x12(?:([\x00-\x7f])|([\x80-\xff])([\x00-\x7f]))")


def engine_options(provider: str, content: bytes | str, setup: str) -> dict[str, str]:
    """The options by which a provider keeps what it compiles in onnxlr's cache.

    Parameters
    ----------
    provider : str
        Its short name.
    content : bytes or str
        The model, or the path of its file.
    setup : str
        All else that what it compiles may depend on.

    Notes
    -----
    Each file has a folder of its own: TensorRT finds an engine again by the names in the graph,
    which candidates of other ranks share. Models in memory are opened once, and leave none.
    The times of TensorRT's kernels are of the machine.
    """
    if provider == "openvino" and (folder := _folder(content, provider, setup)):
        return {"cache_dir": str(folder)}
    if provider == "nvtensorrtrtx" and (folder := _folder(content, provider, setup)):
        return {"nv_runtime_cache_path": str(folder)}
    if provider != "tensorrt":
        return {}
    options: dict[str, str] = {}
    if folder := _folder(content, provider, setup):
        options |= {"trt_engine_cache_enable": "True", "trt_engine_cache_path": str(folder)}
    if folder := _made(_key("kernels", setup)):
        options |= {"trt_timing_cache_enable": "True", "trt_timing_cache_path": str(folder)}
    return options


def _folder(content: bytes | str, *parts: str) -> Path | None:
    if isinstance(content, bytes):
        return None
    try:
        return _made(_key(*parts, _digest(Path(content))))
    except OSError:
        return None


def _made(key: str) -> Path | None:
    """A folder in the cache, which is made, and older ones removed, if it isn't there."""
    cache, most_bytes = cache_place()
    if cache is None:
        return None
    folder = cache / f"{ENGINES}-{key}"
    try:
        if folder.is_dir():
            folder.touch()  # it counts as used now
        else:
            engines = [e for e in find_entries(cache) if e.kind == ENGINES]
            remove(beyond(engines, most_bytes // _SHARE))
            folder.mkdir(parents=True)
    except OSError:  # nothing is kept, then
        return folder if folder.is_dir() else None
    return folder


def _key(*parts: str) -> str:
    return hashlib.sha256(repr((runtime_version(), *parts)).encode()).hexdigest()[:20]


def _digest(path: Path) -> str:
    """A digest of a model's file, and of the places, sizes and ages of its external data."""
    content = path.read_bytes()
    digest = hashlib.sha256(content)
    locations = set()
    for found in _LOCATION.finditer(content):
        length = found[1][0] if found[1] else (found[2][0] & 127) + (found[3][0] << 7)
        locations.add(content[found.end() : found.end() + length])
    for location in sorted(locations):
        with contextlib.suppress(OSError, ValueError):
            status = (path.parent / location.decode(errors="surrogateescape")).stat()
            digest.update(repr((location, status.st_size, status.st_mtime_ns)).encode())
    return digest.hexdigest()
