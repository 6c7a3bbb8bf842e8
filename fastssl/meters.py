"""Time of a step by phases (data, views, forward, backward, optimizer, other; of a CUDA graph: data, step, other),
images/s, memory, MFU.

On CUDA, phases are marked by events, read some steps later, when the device has passed them: measuring does not change
how a step runs and never waits for the device.  MFU is that of the FLOPs which `step.count_flops` has found.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fastssl.config import Precision

Mark = Any  # a torch.cuda.Event; without CUDA seconds
Phase = tuple[str, Mark, Mark]  # name, start, stop

PHASES = ("data", "views", "forward", "backward", "optimizer", "step")  # step: views to optimizer, as a CUDA graph

# Dense tensor-core TFLOP/s, bf16 or fp16 with fp32 accumulation, from NVIDIA's data sheets (half of "with sparsity").
# TF32, which convolutions use in an fp32 run, is half of it on all of them.  The first name that matches counts.
PEAK_TFLOPS = {
    "GB200": 2500,
    "B200": 2250,
    "GH200": 989,
    "H200 NVL": 835,
    "H200": 989,
    "H100 NVL": 835,
    "H100 PCIe": 756,
    "H100": 989,
    "H800 PCIe": 756,
    "H800": 989,
    "H20": 148,
    "A100": 312,
    "A800": 312,
    "A40": 149.7,
    "A30": 165,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "RTX 4090": 165.2,
    "RTX 3090": 71,
    "RTX A6000": 154.8,
}


def peak_flops(name: str, precision: str) -> float | None:
    """FLOP/s of the device called `name` in "bf16", "fp16" or "fp32" (TF32); None where it is not known."""
    words = name.replace("-", " ").split()
    if {"MIG", "Laptop", "Ti", "D"} & set(words):  # a slice, or a chip with other clocks
        return None
    for known, tflops in PEAK_TFLOPS.items():
        wanted = known.split()
        if all(w in words for w in wanted):
            return tflops * 1e12 / (2 if precision == "fp32" else 1)
    return None


class Flops(TorchDispatchMode):
    """Counts the FLOPs of what runs inside, backward included, by PyTorch's formulas (a multiply-add is two)."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


class Meter:
    """`with meter.phase("views"):` any number of times, then `meter.end_step(step)` for the records that are ready.

    A record has data_ms ... optimizer_ms, step_ms (0 unless the step is one CUDA graph), other_ms, total_ms (from the
    end of the step before: hooks, logging and checkpoints between two steps are in other_ms), images_per_s (of all
    ranks), memory_gib and mfu (None without `flops` or where the device's peak is not known).
    """

    def __init__(self, device: torch.device, *, batch: int, precision: Precision = "fp32", peak: float | None = None):
        self.device, self.batch = torch.device(device), batch
        self.cuda = self.device.type == "cuda"
        self.peak = peak or (peak_flops(torch.cuda.get_device_name(self.device), precision) if self.cuda else None)
        self.flops: int | None = None  # of this rank in one step
        self._pool: list[torch.cuda.Event] = []
        self._phases: list[Phase] = []  # of the step in progress
        self._pending: deque[tuple[int, Mark, list[Phase], Mark]] = deque()  # (step, begin, phases, stop)
        self._end: Mark | None = None  # mark at the end of the step before

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what runs inside, added to the phase `name` of PHASES."""
        assert name in PHASES, name
        start = self._mark()
        yield
        self._phases.append((name, start, self._mark()))

    def end_step(self, step: int) -> list[dict]:
        """Close `step`; returns the records of it and of earlier steps that the device has finished by now."""
        stop = self._mark()
        begin = self._end or (self._phases[0][1] if self._phases else stop)
        self._pending.append((step, begin, self._phases, stop))
        self._phases, self._end = [], stop
        return self._ready()

    def flush(self) -> list[dict]:
        """Wait for the device and return all records that are left."""
        if self.cuda and self._pending:
            self._pending[-1][3].synchronize()
        return self._ready()

    def _mark(self) -> Mark:
        if not self.cuda:
            return time.perf_counter()
        event = self._pool.pop() if self._pool else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _ready(self) -> list[dict]:
        records = []
        while self._pending and (not self.cuda or self._pending[0][3].query()):
            step, begin, phases, stop = self._pending.popleft()
            records.append(self._record(step, begin, phases, stop))
            if self.cuda:  # `stop` is the next step's `begin`
                self._pool += {begin, *(mark for _, *marks in phases for mark in marks)}
        return records

    def _record(self, step: int, begin: Mark, phases: list[Phase], stop: Mark) -> dict:
        spent = dict.fromkeys(PHASES, 0.0)
        for name, start, end in phases:
            spent[name] += self._ms(start, end)
        total = self._ms(begin, stop)
        record: dict[str, float | None] = {f"{name}_ms": ms for name, ms in spent.items()}
        record |= {
            "step": step,
            "other_ms": total - sum(spent.values()),
            "total_ms": total,
            "images_per_s": self.batch / total * 1e3 if total else None,
            "memory_gib": memory_gib(self.device),
        }
        record["mfu"] = self.flops / (total / 1e3) / self.peak if self.flops and self.peak and total else None
        return record

    def _ms(self, start: Mark, stop: Mark) -> float:
        return start.elapsed_time(stop) if self.cuda else (stop - start) * 1e3


def memory_gib(device: torch.device) -> float:
    """Peak of what PyTorch has allocated on a CUDA device; what the process holds in RAM otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30
    except OSError:  # no /proc: the peak, in KiB except on macOS
        import resource
        import sys

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
