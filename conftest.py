"""What pytest leaves out where torch or Olive isn't installed, and how it uses several cores.

Hypothesis draws the same examples in every run: a change of the code is what makes a test fail.
With ``--hypothesis-profile=default`` it draws others.
"""

import os
from importlib.util import find_spec
from typing import Any

import pytest
from hypothesis import settings

_NEEDED = {"onnxlr/training/*": "torch", "onnxlr/olive/optimize_pass.py": "olive"}
collect_ignore_glob = [place for place, package in _NEEDED.items() if not find_spec(package)]

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread each, or they wait for one another's
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

settings.register_profile("fixed", derandomize=True)
settings.load_profile("fixed")

# Files that take longest, so that no core is still busy with one when the others are done.
_LONG = (
    *("training/test_factorize", "end_to_end/test_promise", "robustness/test_outputs"),
    *("robustness/test_faults", "end_to_end/test_with_data", "robustness/test_command_ends"),
    *("end_to_end/test_determinism", "end_to_end/test_shipped", "models/test_experiments"),
    *("system/test_cluster", "models/test_conformance", "models/test_networks"),
    *("models/test_guide", "models/test_train_command", "training/test_metric"),
    *("training/test_twist", "robustness/test_trials", "end_to_end/test_package"),
    *("courses/test_narrowed_runs", "methods/test_any_shape", "models/test_epochs"),
    *("olive/test_optimize_pass", "methods/test_methods", "system/test_pool"),
)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Have pytest-xdist hand out files in the order in which they were collected."""
    node.config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of long files first."""

    def rank(item: pytest.Item) -> int:
        place = item.nodeid.partition(".py")[0].removeprefix("tests/")
        return _LONG.index(place) if place in _LONG else len(_LONG)

    items.sort(key=rank)
