"""What rank 0 does for all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastssl import dist


def on_main(work: Callable[[], Any], remedy: str) -> Any:
    """What `work()` returns on rank 0, on every rank; or its error, which for a file that cannot be read or written
    ends with `remedy`."""

    def guarded() -> Any:
        try:
            return work()
        except OSError as error:
            raise ValueError(f"{error}; {remedy}") from None

    return dist.on_main(guarded)
