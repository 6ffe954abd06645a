"""How much memory there is for what comes next."""

import contextlib
from pathlib import Path

import psutil

_PLENTY = 1 << 62  # where nobody tells
# Of the control group a container runs in: version 2, then version 1.
_LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


def available_memory() -> int:
    """Bytes that can still be had: of the machine, the container, and this process's own limit."""
    return max(0, min(_of_machine(), _of_container(), _of_process()))


def address_space_used() -> int | None:
    """Bytes of address space that this process takes; None where the system doesn't tell."""
    try:
        return int(psutil.Process().memory_info().vms)
    except (psutil.Error, OSError):  # no /proc, or that of other processes
        return None


def _of_machine() -> int:
    try:
        return int(psutil.virtual_memory().available)
    except (psutil.Error, OSError):
        return _PLENTY


def _of_container() -> int:
    for limit, used in _LIMITS:
        with contextlib.suppress(OSError, ValueError):
            left = int(Path(limit).read_text()) - int(Path(used).read_text())
            # What is cached of files counts as used, and is given back when it is asked for.
            return left + _cached(Path(limit).parent / "memory.stat")
    return _PLENTY


def _cached(stat: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        rows = dict(line.split() for line in stat.read_text().splitlines())
        return int(rows.get("inactive_file", 0)) + int(rows.get("active_file", 0))
    return 0


def _of_process() -> int:
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return _PLENTY
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    own = address_space_used()
    return _PLENTY if own is None or soft == resource.RLIM_INFINITY else soft - own


def format_bytes(nbytes: float) -> str:
    """A number of bytes as people say it.

    Examples
    --------
    >>> words(3_250_000_000)
    '3.2 GB'
    >>> words(740_000)
    '0.7 MB'
    """
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
