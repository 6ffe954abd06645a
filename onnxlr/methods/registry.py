"""The installed methods: found by their entry points, and by name."""

from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from onnxlr.errors import UsageError, one_line
from onnxlr.methods.base import GraphPass
from onnxlr.system.cache import ENTRY_POINTS


@dataclass(frozen=True)
class InstalledPass:
    """A pass as installed: the instance, and the distribution that brought it."""

    graph_pass: GraphPass
    distribution: str


@cache
def installed_passes() -> dict[str, InstalledPass]:
    """Every pass that an installed package announces in the group ``onnxlr.passes``, by name.

    Raises
    ------
    UsageError
        If one can't be imported, isn't a pass, or two have the same name.
    """
    passes: dict[str, InstalledPass] = {}
    for entry in sorted(entry_points(group=ENTRY_POINTS), key=_order):
        origin = entry.dist.name if entry.dist is not None else "unknown"
        try:
            loaded = entry.load()()
            whole = _is_pass(loaded, entry.name)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a package that ends the process is none of ours either
            raise UsageError(
                f"the pass {entry.name!r} of {origin} can't be loaded ({one_line(error)}): "
                f"repair or uninstall {origin}"
            ) from None
        if not whole:
            raise UsageError(
                f"the entry point {entry.name!r} of {origin} is no pass of that name, whose "
                f"summary, ops and numbers say what it does: repair or uninstall {origin}"
            )
        known = passes.get(entry.name)
        if known is not None and type(known.graph_pass) is not type(loaded):
            raise UsageError(
                f"{origin} and {known.distribution} both bring a pass {entry.name!r}: uninstall one"
            )
        passes[entry.name] = InstalledPass(loaded, origin)
    return passes


def _is_pass(loaded: object, name: str) -> bool:
    """Whether it is one, and tells of itself what every pass tells."""
    if not isinstance(loaded, GraphPass):
        return False
    told = (getattr(loaded, word, None) for word in ("name", "summary", "paper", "fallback"))
    rows = ((getattr(loaded, "ops", None), str), (loaded.numbers, int))
    return (
        all(isinstance(text, str) for text in told)
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
    chosen = {name: find_pass(name) for name in names if name != "auto"}
    if not names or "auto" in names:
        known = [entry.graph_pass for entry in installed_passes().values()]
        return tuple(p for p in known if p.automatic or p.name in chosen)
    return tuple(chosen.values())


def find_pass(name: str) -> GraphPass:
    """The pass of this very name.

    Raises
    ------
    UsageError
        If none is installed.
    """
    known = installed_passes()
    if name not in known:
        raise UsageError(
            f"the method {name!r} is not installed: choose from auto, {', '.join(known)}"
        )
    return known[name].graph_pass


def culprit(error: BaseException) -> str | None:
    """The pass in which an error arose, and who brought it, for the message."""
    at, found = error.__traceback__, None
    while at is not None:
        held = at.tb_frame.f_locals
        for name in ("self", "graph_pass"):  # in it, or with what it gave
            if isinstance(held.get(name), GraphPass):
                found = held[name]
        at = at.tb_next
    if found is None:
        return None
    origin = installed_passes().get(found.name)
    return f"the method {found.name!r}" + ("" if origin is None else f" of {origin.distribution}")


def _order(entry: EntryPoint) -> tuple[bool, str, str]:
    # Our own first, whatever else is installed: the first of two equal candidates wins a tie.
    own = entry.dist is not None and entry.dist.name == "onnxlr"
    return (not own, entry.name, entry.dist.name if entry.dist is not None else "")
