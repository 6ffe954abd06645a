"""The installed methods, looked up by their entry points and by name."""

from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from onnxlr.errors import UsageError, one_line
from onnxlr.methods.base import GraphPass
from onnxlr.methods.channels import INTERPOLATIVE
from onnxlr.system.cache import ENTRY_POINTS


@dataclass(frozen=True)
class InstalledPass:
    """A pass as installed: the instance, and the distribution that brought it."""

    graph_pass: GraphPass
    distribution: str


@dataclass(frozen=True)
class _Found:
    """What entry points announce: passes, and why others can't be used, both by name."""

    passes: dict[str, InstalledPass]
    broken: dict[str, str]


def installed_passes() -> dict[str, InstalledPass]:
    """Every usable pass that an installed package announces in the group ``onnxlr.passes``."""
    return _found().passes


def broken_passes() -> dict[str, str]:
    """Why passes that are announced can't be used, by name: only who names one is stopped."""
    return _found().broken


@cache
def _found() -> _Found:
    found = _Found({}, {})
    for entry in sorted(entry_points(group=ENTRY_POINTS), key=_order):
        origin = entry.dist.name if entry.dist is not None else "unknown"
        try:
            loaded = entry.load()()
            whole = _is_pass(loaded, entry.name)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a package that ends the process is none of ours either
            found.broken[entry.name] = (
                f"the pass {entry.name!r} of {origin} can't be loaded ({one_line(error)}): "
                f"repair or uninstall {origin}"
            )
            continue
        if not whole:
            found.broken[entry.name] = (
                f"the entry point {entry.name!r} of {origin} is not a pass of that name with a "
                f"summary, ops and numbers: repair or uninstall {origin}"
            )
            continue
        earlier = found.passes.get(entry.name)
        if earlier is not None and type(earlier.graph_pass) is not type(loaded):
            found.broken[entry.name] = (
                f"{origin} and {earlier.distribution} both bring a pass {entry.name!r}: "
                "uninstall one"
            )
            continue
        found.passes[entry.name] = InstalledPass(loaded, origin)
    return found


def _is_pass(loaded: object, name: str) -> bool:
    """Whether an entry point has loaded a pass of its name, with the words every pass has."""
    if not isinstance(loaded, GraphPass):
        return False
    texts = (getattr(loaded, word, None) for word in ("name", "summary", "paper", "fallback"))
    rows = ((getattr(loaded, "ops", None), str), (loaded.numbers, int))
    return (
        all(isinstance(text, str) for text in texts)
        and loaded.name == name
        and all(isinstance(row, tuple) for row, _ in rows)
        and all(isinstance(item, kind) for row, kind in rows for item in row or ())
    )


def choose_passes(names: tuple[str, ...]) -> tuple[GraphPass, ...]:
    """The passes of these names; for ``auto`` every one that is tried unasked.

    Raises
    ------
    UsageError
        For a name that no installed pass has.
    """
    others = ("auto", INTERPOLATIVE.name)
    chosen = {name: find_pass(name) for name in names if name not in others}
    if not names or "auto" in names:
        passes = [entry.graph_pass for entry in installed_passes().values()]
        return tuple(p for p in passes if p.automatic or p.name in chosen)
    return tuple(chosen.values())


def find_pass(name: str) -> GraphPass:
    """The pass of this very name.

    Raises
    ------
    UsageError
        If none is installed, or what is can't be used.
    """
    installed, broken = installed_passes(), broken_passes()
    if name in broken:
        raise UsageError(broken[name])
    if name not in installed:
        raise UsageError(
            f"the method {name!r} is not installed: choose from auto, "
            f"{INTERPOLATIVE.name}, {', '.join(installed)}"
        )
    return installed[name].graph_pass


def culprit(error: BaseException) -> str | None:
    """The pass in which an error arose, and who brought it, for the message."""
    at, innermost = error.__traceback__, None
    while at is not None:
        names = at.tb_frame.f_locals
        for name in ("self", "graph_pass"):  # in one of its methods, or with what that returned
            if isinstance(names.get(name), GraphPass):
                innermost = names[name]
        at = at.tb_next
    if innermost is None:
        return None
    origin = installed_passes().get(innermost.name)
    return f"the method {innermost.name!r}" + (
        "" if origin is None else f" of {origin.distribution}"
    )


def _order(entry: EntryPoint) -> tuple[bool, str, str]:
    # Built-in methods first, whatever else is installed: the first of two equals wins a tie.
    built_in = entry.dist is not None and entry.dist.name == "onnxlr"
    return (not built_in, entry.name, entry.dist.name if entry.dist is not None else "")
