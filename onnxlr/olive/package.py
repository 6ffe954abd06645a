"""Olive's package configuration, which says where its passes are, with ours among them."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from onnxlr.errors import RuntimeMissingError
from onnxlr.system.files import read_json

OUR_NAME = "Onnxlr"  # what a run's configuration calls it
_FILE = "olive_config.json"
# It times models, so it runs where they will.
_ENTRY = {
    "module_path": f"onnxlr.olive.optimize_pass.{OUR_NAME}",
    "supported_providers": ["*"],
    "supported_accelerators": ["*"],
    "supported_precisions": ["*"],
    "supported_algorithms": [],
    "supported_quantization_encodings": [],
    "run_on_target": True,
    "dataset": "dataset_optional",
    "module_dependencies": ["onnxlr[olive]"],
}


def installed_config() -> Path:
    """The package configuration of the Olive that is installed here.

    Raises
    ------
    RuntimeMissingError
        If there is none.
    """
    spec = find_spec("olive")
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder) / _FILE).is_file():
            return path
    raise RuntimeMissingError("Olive isn't installed here: pip install 'onnxlr[olive]'")


def with_our_pass(path: Path) -> dict[str, Any]:
    """A package configuration with our pass beside those that are there.

    Raises
    ------
    RuntimeMissingError
        If the file isn't one of an Olive that can be extended like that.
    """
    config = read_json(path)
    passes = config.get("passes")
    if not isinstance(passes, dict) or not passes:
        raise RuntimeMissingError(
            f"{path} lists no passes: onnxlr doesn't know this version of Olive; install one that "
            "it knows with pip install 'onnxlr[olive]'"
        )
    return {**config, "passes": {**passes, OUR_NAME: _ENTRY}}
