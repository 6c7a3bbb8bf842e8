"""A training step as one CUDA graph: a replay is one launch instead of hundreds.

The inputs of a step are on the device at fixed addresses: the batch, and `StepInputs`, which one copy writes before
every step.  The step is the same function with and without a graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fastssl import dist
from fastssl.loader import Batch

WARMUP_STEPS = 3  # before a capture: kernels are compiled and tuned, optimizer state is allocated
TENSORS = ("pixels", "sizes", "index", "label")  # fields of a Batch


class StepInputs:
    """The numbers that change from step to step, as 0-dim tensors on the device."""

    def __init__(self, groups: int, device: torch.device):
        self._packed = torch.zeros(4 + 2 * groups, dtype=torch.int64, device=device)
        self.epoch, self.step, self.position = self._packed[:3].unbind()
        self.progress = self._packed[3].view(torch.float64)  # fraction of the run's steps before this one
        self._rates = self._packed[4:].view(torch.float64)  # lr and weight decay of each group

    def write(self, batch: Batch, groups: list[dict], progress: float) -> None:
        """Set all of them by one asynchronous copy.  `groups`: the optimizer's param_groups."""
        host = torch.empty(self._packed.shape, dtype=torch.int64, pin_memory=self._packed.is_cuda)
        words = host.numpy()
        words[:3] = batch.epoch, batch.step, batch.position or 0
        words[3:4].view(np.float64)[0] = progress
        words[4:].view(np.float64)[:] = [g[key] for g in groups for key in ("lr", "weight_decay")]
        self._packed.copy_(host, non_blocking=True)  # torch's allocator keeps pinned memory until the copy is done

    @contextlib.contextmanager
    def tensor_rates(self, groups: list[dict], decays: bool) -> Iterator[None]:
        """Inside, the groups' lr (with `decays` also the weight decay) are tensors of the parameters' dtype; outside
        they are numbers, as checkpoints need them."""
        numbers = [(g["lr"], g["weight_decay"]) for g in groups]
        rates = self._rates.to(groups[0]["params"][0].dtype).unbind()
        for g, lr, decay in zip(groups, rates[::2], rates[1::2]):
            g["lr"] = lr
            if decays:
                g["weight_decay"] = decay
        try:
            yield
        finally:
            for g, (lr, decay) in zip(groups, numbers):
                g["lr"], g["weight_decay"] = lr, decay


@dataclass
class Captured:
    """A CUDA graph with its input and output tensors, which every replay overwrites."""

    key: Hashable
    graph: torch.cuda.CUDAGraph
    batch: Batch
    out: dict[str, Tensor]
    scalars: dict
    packed: Tensor | None  # the tensors among `scalars`, float32

    def replay(self, batch: Batch) -> tuple[dict[str, Tensor], dict]:
        for name in TENSORS:
            getattr(self.batch, name).copy_(getattr(batch, name), non_blocking=True)
        self.graph.replay()
        if self.packed is None:
            return self.out, dict(self.scalars)
        values = iter(self.packed.clone().unbind())  # a copy: the log reads them some steps later
        return self.out, {
            name: _as(next(values), value.dtype) if isinstance(value, Tensor) else value
            for name, value in self.scalars.items()
        }


def _as(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.bool() if dtype == torch.bool else value


class CapturableStep:
    """`function(batch, timer) -> (out, scalars)`, a step that reads nothing from the device, captured as a CUDA graph.

    `reason`: why it is not captured; None: it is.  The first WARMUP_STEPS steps run eagerly, then the step is captured;
    for other shapes of the batch, or another `graph_key` of the method, this starts again.  If a capture fails, on any
    rank, that is printed once and all further steps run eagerly.
    """

    def __init__(self, function: Callable, reason: str | None):
        self.function, self.reason = function, reason
        self._captured: Captured | None = None
        self._warmup: tuple[Hashable, int] = (None, 0)  # key, eager steps with it
        dist.graphs.add(self)

    def close(self) -> None:
        """Delete the graph."""
        self._captured = None

    def prepare_replay(self, batch: Batch, step_key: Hashable = None) -> bool:
        """Count a warm-up step, or capture the step after them; returns whether it can be replayed."""
        if self.reason is not None:
            return False
        key = (step_key, batch.position is None, *(getattr(batch, name).shape for name in TENSORS), batch.label.dtype)
        if self._captured is not None and self._captured.key == key:
            return True
        self._captured = None
        seen = self._warmup[1] if self._warmup[0] == key else 0
        if seen == WARMUP_STEPS:
            self._captured = self._capture(key, batch)
            self._compare_ranks(batch.pixels.device)
            seen = 0
        self._warmup = (key, seen + (self._captured is None))
        return self._captured is not None

    def replay(self, batch: Batch) -> tuple[dict[str, Tensor], dict]:
        assert self._captured is not None, "replay follows prepare_replay"
        return self._captured.replay(batch)

    def _capture(self, key: Hashable, batch: Batch) -> Captured | None:
        device = batch.pixels.device
        state, stream = torch.cuda.get_rng_state(device), torch.cuda.current_stream(device)
        static = replace(batch, **{name: getattr(batch, name).clone() for name in TENSORS})
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        try:
            # relaxed: the loader's threads allocate and copy at the same time, on other streams
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="relaxed"):
                out, scalars = self.function(static, lambda name: contextlib.nullcontext())
                tensors = [v.float().reshape(()) for v in scalars.values() if isinstance(v, Tensor)]
                packed = torch.stack(tensors) if tensors else None
        except Exception as error:  # anything in a method or a library that is not allowed during a capture
            torch.cuda.set_stream(stream)  # torch.cuda.graph does not restore it where the end of the capture fails
            _recover(device, pool, state)
            first: BaseException = error  # of the errors in its handling: that is the reason
            while first.__context__ is not None:
                first = first.__context__
            self.reason = f"the capture failed: {type(first).__name__}: {' '.join(str(first).split())[:300]}"
            return None
        return Captured(key, graph, static, out, scalars, packed)

    def _compare_ranks(self, device: torch.device) -> None:
        """No rank may replay its graph where another's capture has failed: NCCL needs collectives that all ranks have
        captured."""
        if dist.world() > 1:
            captured = dist.sum_(torch.tensor(int(self._captured is not None), device=device))
            if captured < dist.world():
                self._captured, self.reason = None, self.reason or "the capture failed on another rank"
        if self._captured is None and dist.is_main():
            print(f"speed.graph: the step is not a CUDA graph: {self.reason}")


def _recover(device: torch.device, pool: tuple, state: Tensor) -> None:
    """Undo the effects of a failed capture on the allocator's pool and on the generator, which is still recording."""
    with contextlib.suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(device.index, pool)
    fresh = torch.Generator(device)
    fresh.set_state(state)
    torch.cuda.default_generators[device.index].graphsafe_set_state(fresh)
    torch.cuda.synchronize(device)
