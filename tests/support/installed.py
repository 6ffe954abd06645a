"""Packages with methods, laid out as an installer leaves them, and looked up anew."""

from collections.abc import Mapping
from pathlib import Path

from onnxlr.methods import registry
from onnxlr.system import cache


def write_metadata(folder: Path, name: str, version: str, passes: Mapping[str, str]) -> None:
    """Write what an installer writes beside a package's modules: its name, version and passes."""
    information = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    )
    rows = (f"{entry} = {place}\n" for entry, place in passes.items())
    (information / "entry_points.txt").write_text("[onnxlr.passes]\n" + "".join(rows))


def forget_installed() -> None:
    """Have this process look up anew which packages with methods are installed."""
    registry._found.cache_clear()
    cache._pass_packages.cache_clear()
