"""Which samples of a file each rank gets: the order of an epoch, cut into batches, ranks and micro-batches.

The order is a permutation by (seed, epoch), and rank r takes the r-th slice of each batch: on any number of ranks and
in any number of micro-batches, training sees the batches that one rank sees.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from fastssl import dist


class MicroBatch(NamedTuple):
    step: int  # of the epoch
    position: int  # of its first sample in the order of the epoch
    rows: np.ndarray  # int64 (B,), of the file


@dataclass(frozen=True)
class Sampler:
    """How the samples of an epoch are ordered and divided.

    Training (default): shuffled, and the last batch is dropped if it is incomplete.  Evaluation (`sequential`): in the
    order of the file, every sample once over all ranks; of an incomplete last batch some ranks may get nothing.
    ValueError for numbers that are out of range."""

    seed: int = 0
    micro_per_step: int = 1  # equal micro-batches of each rank in a step
    shuffle: bool = True
    drop_last: bool = True
    rank: int = field(default_factory=dist.rank)
    world: int = field(default_factory=dist.world)

    def __post_init__(self) -> None:
        for name in ("world", "micro_per_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be 1 or more")
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank={self.rank}: must be 0 or more and below world={self.world}")

    @classmethod
    def sequential(cls, **options: int) -> Sampler:
        """For evaluation: in the order of the file, every sample once."""
        return cls(shuffle=False, drop_last=False, **options)

    def check_batch(self, batch: int, samples: int, path: str) -> None:
        """ValueError for a batch (of all ranks together) that cannot be divided, or that the file cannot fill."""
        parts = self.world * self.micro_per_step
        if self.drop_last and samples < parts:
            raise ValueError(
                f"{path} has {samples} samples, fewer than the {self.world} * {self.micro_per_step} (world * "
                "micro_per_step) parts of a batch: use fewer ranks, a larger speed.micro_batch, or more data"
            )
        if batch < 1 or batch % parts:
            nearest = max(1, round(batch / parts)) * parts
            raise ValueError(
                f"batch={batch} is not divisible by world * micro_per_step = {self.world} * {self.micro_per_step}; "
                f"the nearest batch that is: {nearest}"
            )
        if self.drop_last and batch > samples:
            raise ValueError(
                f"batch={batch} is larger than {path} ({samples} samples); use at most {samples // parts * parts}"
            )

    def steps(self, batch: int, samples: int) -> int:
        """The number of steps in an epoch."""
        return samples // batch if self.drop_last else -(-samples // batch)

    def micro_batches(
        self, batch: int, samples: int, epoch: int, start: int = 0, order: np.ndarray | None = None
    ) -> list[MicroBatch]:
        """This rank's micro-batches from step `start` to the end of the epoch, without empty ones.  `order` (samples,):
        rows to take instead of the epoch's permutation."""
        if order is None:
            order = permutation(samples, self.seed, epoch) if self.shuffle else np.arange(samples)
        positions, found = np.arange(samples), []
        for step in range(start, self.steps(batch, samples)):
            of_rank = _slice(positions[step * batch : (step + 1) * batch], self.rank, self.world)
            for part in (_slice(of_rank, k, self.micro_per_step) for k in range(self.micro_per_step)):
                if len(part):
                    found.append(MicroBatch(step, int(part[0]), order[part]))
        return found


def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """int64 (n,), the same on every platform: NumPy keeps Philox's raw bits stable, not its `permutation`."""
    if seed < 0 or epoch < 0:
        raise ValueError(f"seed={seed}, epoch={epoch}: both must be 0 or more")
    return np.argsort(np.random.Philox(key=[seed, epoch]).random_raw(n), kind="stable")


def _slice(rows: np.ndarray, k: int, parts: int) -> np.ndarray:
    """The k-th of `parts` contiguous slices, whose lengths differ by at most 1."""
    return rows[k * len(rows) // parts : (k + 1) * len(rows) // parts]
