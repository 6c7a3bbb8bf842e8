"""How much memory of the machine this process may still take."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

# Of the memory controller, by version of the control groups: where they are mounted, and the files of limit and use.
VERSIONS = {
    1: (("sys/fs/cgroup/memory",), "memory.limit_in_bytes", "memory.usage_in_bytes"),
    2: (("sys/fs/cgroup", "sys/fs/cgroup/unified"), "memory.max", "memory.current"),
}


def free_bytes(root: Path = Path("/")) -> int:
    """Bytes that are free on the machine, or fewer where a control group of the process (of a container, a Slurm job, a
    systemd unit) has a lower limit.  Cached pages of files count as free: the kernel drops them for new memory.

    `root`: of the file system, for tests."""
    return max(0, min([_available((root / "proc/meminfo").read_text()), *_left_in_groups(root)]))


def _available(meminfo: str) -> int:
    """Bytes that the kernel estimates to be free for new memory.  Where it gives no estimate (before Linux 3.14, and in
    some containers): free pages, and cached ones of files, which "Cached" counts together with shared memory."""
    values = dict(line.partition(":")[::2] for line in meminfo.splitlines())

    def kib(name: str) -> int:
        return int(values.get(name, "0 kB").split()[0])

    available = kib("MemAvailable") if "MemAvailable" in values else kib("MemFree") + kib("Cached") - kib("Shmem")
    return available * 1024


def _left_in_groups(root: Path) -> Iterator[int]:
    """What is left of each limit on the process's control group or one above it."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # a kernel without them
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number != "0" and "memory" not in controllers.split(","):
            continue
        mounts, limit, use = VERSIONS[2 if number == "0" else 1]
        # In a container the path may be one of the host, where only the mount itself is there.
        parts = [part for part in Path(path).parts if part not in ("/", "..")]
        for folder in (root.joinpath(mount, *parts[:n]) for mount in mounts for n in range(len(parts) + 1)):
            with contextlib.suppress(OSError, ValueError):  # no such group, or the limit "max"
                yield int((folder / limit).read_text()) - int((folder / use).read_text()) + _cached(folder)


def _cached(folder: Path) -> int:
    """Bytes of files' pages in a control group; in version 1 those of its children are in "total_..."."""
    file = folder / "memory.stat"
    if not file.exists():  # some sandboxes have a limit without statistics
        return 0
    values = dict(line.split() for line in file.read_text().splitlines())
    return sum(int(values.get(f"total_{name}", values.get(name, 0))) for name in ("inactive_file", "active_file"))
