"""Packages of others that bring passes: looked up, told apart by version, refused if broken."""

import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import onnxlr
from onnxlr.cli.actions import passes
from onnxlr.errors import UsageError
from onnxlr.methods.registry import choose_passes, find_pass, installed_passes
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
    assert "others" not in installed_passes()
    with pytest.raises(UsageError, match="'others' of others_0 is not a pass"):
        find_pass("others")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (NAMELESS, "is not a pass of that name"),
        ("import a_module_that_is_not_there", "can't be loaded"),
        ("raise SystemExit(3)", "can't be loaded"),
        ("class Another: pass", "can't be loaded"),
    ],
)
def test_a_broken_pass_stops_only_who_names_it(
    install: Install, source: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    install(source, "1.0")
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    model = linear(weight)
    assert len(onnxlr.optimize(model, rank=8, verify="none").plan.replaced) == 1
    assert onnxlr.inspect(model)
    with pytest.raises(UsageError, match=f"'others' of others_0 {reason}"):
        onnxlr.optimize(model, rank=8, verify="none", method="others")
    passes()
    printed = capsys.readouterr().out
    assert "channel-svd" in printed
    assert "others_0" in printed
    assert reason in " ".join(printed.split())


@pytest.mark.parametrize(("line", "joins"), [("automatic = True", True), ("", False)])
def test_a_new_pass_joins_auto_only_if_it_says_so(install: Install, line: str, joins: bool) -> None:
    source = """
        from onnxlr.methods import ChainPass
        from onnxlr_passes.svd import Svd

        class Others(ChainPass):
            name, summary, ops, paper = "others", "as svd", ("MatMul",), ""
            LINE
            refuse, factorize, write = Svd.refuse, Svd.factorize, Svd.write
            factor_shapes, compose = Svd.factor_shapes, Svd.compose
            full_rank, unfoldings = Svd.full_rank, Svd.unfoldings
    """
    install(source.replace("LINE", line), "1.0")
    assert ("others" in {p.name for p in choose_passes(("auto",))}) == joins
    assert [p.name for p in choose_passes(("others",))] == ["others"]
