"""Errors: the first rank that fails prints the reason, the others end without output."""

from __future__ import annotations

import os
import time
from datetime import timedelta

import torch.distributed as td

from fastssl import dist

FAILED = "fastssl/failed"  # key in the process group's store: "code rank reason" of the first rank that failed
_noticed = False  # whether this rank has seen that another one has failed


def report_failure(reason: str, code: int, store: td.Store | None = None) -> tuple[bool, int]:
    """Tell the other ranks, by the process group's store or another connection to it, that this one ends with exit code
    `code`.  Returns whether this rank prints its reason, and the exit code of the first rank to record its failure.

    Who prints: normally the first rank to record its failure; before the process group exists, local rank 0 of each
    node; without the store those of `prints_alone`."""
    if not td.is_initialized():
        return _local_rank() == 0, code
    if dist.world() == 1:
        return True, code
    store, mine = store or td.distributed_c10d._get_default_store(), f"{code} {dist.rank()} {reason}"
    try:
        store.set_timeout(timedelta(seconds=5))
        recorded = store.compare_set(FAILED, "", mine).decode()
        first = recorded == mine
        seen = store.add(FAILED + "/seen", 1)
        deadline = time.monotonic() + 3
        while first and seen < dist.world() and time.monotonic() < deadline:  # rank 0 may host the store
            time.sleep(0.1)
            seen = store.add(FAILED + "/seen", 0)
        return first, int(recorded.split()[0])
    except RuntimeError:
        return prints_alone(), code


def prints_alone() -> bool:
    """Whether this rank prints its reason although it cannot ask the others, since the store is lost with rank 0: one
    rank on each node, unless it already knows of another failure."""
    return (dist.rank() == 1 or (_local_rank() == 0 and not dist.is_main())) and not _noticed


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def failed_code(store: td.Store) -> int:
    """The exit code of a rank that has failed, else 0."""
    global _noticed
    if not store.check([FAILED]):
        return 0
    code = int(store.get(FAILED).split()[0])
    if not _noticed:
        _noticed = True
        store.add(FAILED + "/seen", 1)
    return code
