"""How much memory is free for what comes next, and how much this process uses."""

import contextlib
from pathlib import Path

import psutil

_UNLIMITED = 1 << 62  # bytes; the answer where the system sets or tells no limit
# Limit and usage of the control group that a container runs in: version 2, then version 1.
_CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


def available_memory() -> int:
    """Bytes that this process may still take, within the machine, the container and its limit."""
    return max(0, min(_free_of_machine(), _free_of_container(), _free_of_process()))


def address_space_used() -> int | None:
    """Bytes of address space that this process uses; None where the system doesn't tell."""
    try:
        return int(psutil.Process().memory_info().vms)
    except (psutil.Error, OSError):  # there is no /proc, or it is that of other processes
        return None


def _free_of_machine() -> int:
    try:
        return int(psutil.virtual_memory().available)
    except (psutil.Error, OSError):
        return _UNLIMITED


def _free_of_container() -> int:
    for limit, usage in _CGROUP_FILES:
        with contextlib.suppress(OSError, ValueError):
            free = int(Path(limit).read_text()) - int(Path(usage).read_text())
            # Cached files count as used, though the system gives that memory back on demand.
            return free + _file_cache_bytes(Path(limit).parent / "memory.stat")
    return _UNLIMITED


def _file_cache_bytes(stat: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        rows = dict(line.split() for line in stat.read_text().splitlines())
        return int(rows.get("inactive_file", 0)) + int(rows.get("active_file", 0))
    return 0


def _free_of_process() -> int:
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return _UNLIMITED
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    used = address_space_used()
    return _UNLIMITED if used is None or soft == resource.RLIM_INFINITY else soft - used


def format_bytes(nbytes: float) -> str:
    """A number of bytes in MB or GB.

    Examples
    --------
    >>> format_bytes(3_250_000_000)
    '3.2 GB'
    >>> format_bytes(740_000)
    '0.7 MB'
    """
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
