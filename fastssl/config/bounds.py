"""Types of settings with bounds, for sections and methods: `temperature: Positive = 0.1`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class Bounds:
    """From `low` to `high`, both included; `above`: without `low` itself."""

    low: float
    high: float = math.inf
    above: bool = False

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.above else f"at least {self.low:g}"
        return low + (f" and at most {self.high:g}" if self.high < math.inf else " and finite")

    def check(self, value: float, key: str) -> None:
        """ValueError for a number outside, and for NaN and infinity."""
        low = value > self.low if self.above else value >= self.low
        if not (low and value <= self.high and math.isfinite(value)):
            raise ValueError(f"{key}={value!r} must be {self}")


Positive = Annotated[float, Bounds(0, above=True)]
NonNegative = Annotated[float, Bounds(0)]
Fraction = Annotated[float, Bounds(0, 1)]
PositiveInt = Annotated[int, Bounds(1)]
Count = Annotated[int, Bounds(0)]
