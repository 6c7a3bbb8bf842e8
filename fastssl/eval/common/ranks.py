"""What rank 0 does for all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastssl import dist


def on_main(work: Callable[[], Any], remedy: str) -> Any:
    """Call `work()` on rank 0; returns its result, or raises its error, on every rank.  An OSError becomes a ValueError
    that ends with `remedy`."""

    def guarded() -> Any:
        try:
            return work()
        except OSError as error:
            raise ValueError(f"{error}; {remedy}") from None

    return dist.on_main(guarded)
