"""Packages of others that bring passes: looked up, told apart by version, refused if broken."""

import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import onnxlr
from onnxlr.errors import UsageError
from onnxlr.methods.registry import installed_passes
from onnxlr.system.cache import key_of
from tests.support.builders import linear
from tests.support.installed import forget_installed, write_metadata

PASS = """
    from onnxlr_passes.svd import Svd

    class Others(Svd):
        name = "others"
        automatic = False
"""
# The same factors the other way round: what an older version stored is none of this one's.
NEWER = """
    from onnxlr.methods import truncated_svd
    from onnxlr_passes.svd import Svd

    class Others(Svd):
        name = "others"
        automatic = False

        def factor_shapes(self, layer, rank):
            return tuple(shape[::-1] for shape in super().factor_shapes(layer, rank))

        def factorize(self, layer, rank):
            return tuple(f[0].T for f in truncated_svd(layer.array()[None], rank[0]))

        def compose(self, layer, rank, factors):
            return super().compose(layer, rank, tuple(f.T for f in factors))

        def form(self, layer):
            return None

        def write(self, layer, use, rank, factors, writer):
            turned = tuple(writer.op("Transpose", [f], {"perm": (1, 0)}) for f in factors)
            return super().write(layer, use, rank, turned, writer)
"""

Install = Callable[[str, str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts a package that brings the pass ``others`` in the place of the one before."""
    count = iter(range(9))

    def put(source: str, version: str) -> None:
        number = next(count)
        for older in tmp_path.glob("*/*.dist-info/entry_points.txt"):
            older.unlink()
        folder = tmp_path / f"site{number}"
        module = f"others_{number}"
        write_metadata(folder, module, version, {"others": f"{module}:Others"})
        (folder / f"{module}.py").write_text(textwrap.dedent(source))
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, module, raising=False)  # of another test
        forget_installed()

    yield put
    monkeypatch.undo()
    forget_installed()


def test_another_version_has_keys_of_its_own(install: Install) -> None:
    alone = key_of("a")
    install(PASS, "1.0")
    first = key_of("a")
    assert installed_passes()["others"].distribution == "others_0"
    assert len({alone, first}) == 2


def test_factors_of_another_version_are_not_used(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONNXLR_CACHE", str(tmp_path / "cache"))
    weight = np.random.default_rng(0).standard_normal((512, 512)).astype(np.float32)
    errors = []
    for number, source in enumerate((PASS, NEWER), 1):
        install(source, f"{number}.0")
        result = onnxlr.optimize(
            linear(weight), method="others", rank=16, max_drop=1, measure=False
        )
        errors.append(result.plan.replaced[0].error)
    assert len(list((tmp_path / "cache").glob("factors-*.npz"))) == 2
    assert errors[0] == pytest.approx(errors[1], rel=1e-6)


NAMELESS = """
    from onnxlr.methods import GraphPass

    Others = type("Others", (GraphPass,), dict.fromkeys(GraphPass.__abstractmethods__, print))
"""


@pytest.mark.parametrize(
    "source",
    [
        NAMELESS,
        *(
            PASS.replace("automatic = False", line)
            for line in ("name = 'another'", "ops = None", "paper = 5", "numbers = ('one',)")
        ),
    ],
)
def test_what_is_no_pass_is_told_with_who_brings_it(install: Install, source: str) -> None:
    install(source, "1.0")
    with pytest.raises(UsageError, match="'others' of others_0 is no pass"):
        installed_passes()
