"""Types of settings with bounds, for sections and methods: `temperature: Positive = 0.1`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class Bounds:
    """From `low` to `high`, both included; `above`, `below`: without `low`, `high` itself; `optional`: or None."""

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False
    optional: bool = False

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.above else f"at least {self.low:g}"
        high = f"below {self.high:g}" if self.below else f"at most {self.high:g}"
        return f"{low} and {high if self.high < math.inf else 'finite'}" + ", or None" * self.optional

    def check(self, value: float | None, key: str) -> None:
        """ValueError for a number outside, and for NaN and infinity."""
        if value is None:
            return
        low = value > self.low if self.above else value >= self.low
        high = value < self.high if self.below else value <= self.high
        if not (low and high and math.isfinite(value)):
            raise ValueError(f"{key}={value!r} must be {self}")


Positive = Annotated[float, Bounds(0, above=True)]
NonNegative = Annotated[float, Bounds(0)]
NonNegativeOrNone = Annotated[float | None, Bounds(0, optional=True)]
Fraction = Annotated[float, Bounds(0, 1)]
BelowOne = Annotated[float, Bounds(0, 1, below=True)]
PositiveInt = Annotated[int, Bounds(1)]
PositiveIntOrNone = Annotated[int | None, Bounds(1, optional=True)]
Count = Annotated[int, Bounds(0)]
