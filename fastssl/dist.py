"""Ranks and the collectives that methods need.  With one process every function is the identity.

The convention of every loss: the loss of the global batch is the mean over ranks of what each rank returns, and
gradients of parameters are averaged over ranks.  The backward passes of `gather` and `mean` are their adjoints, so that
gradients are exact; `replicated_mean` is `mean` without communication in backward, for a mean that every rank uses in
the same way.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import weakref
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor, nn

from fastssl import launcher, rendezvous

# What one rank does while the others wait (scikit-learn's SVMs, faiss, t-SNE) may take more than NCCL's ten minutes.
TIMEOUT = timedelta(hours=2)

# Objects whose `close` deletes a CUDA graph.  Where it holds collectives, NCCL (2.26 and later) waits for its deletion,
# without end, when the process group is destroyed.
graphs: weakref.WeakSet[Any] = weakref.WeakSet()


def init(device: str | None = None) -> torch.device:
    """Join the process group of the launcher (deepspeed, torchrun, srun, mpirun; none: one rank) and choose the device.

    `device`: "cpu" or "cuda"; None: CUDA if there is a GPU.  The backend is NCCL on CUDA, gloo on CPU.  ValueError for
    "cuda" without a GPU, and where the ranks cannot connect.
    """
    if device not in ("cpu", "cuda", None):
        raise ValueError(f"device={device!r}: cpu or cuda (CUDA_VISIBLE_DEVICES=1 selects a GPU)")
    cuda = torch.cuda.is_available() if device is None else device == "cuda"
    if cuda and not torch.cuda.is_available():
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        raise ValueError(
            f"device={device}: torch {torch.__version__} (built {built}) finds no GPU on this machine; "
            "use cpu, or run `fastssl doctor`"
        )
    launcher.set_variables()
    local = int(os.environ.get("LOCAL_RANK", 0))
    if cuda:
        if local and torch.cuda.device_count() == 1:  # srun --gpus-per-task=1: each rank sees its own
            local = 0
        torch.cuda.set_device(local)
    if not td.is_initialized():
        for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1"}.items():
            os.environ.setdefault(name, str(value))
        if "MASTER_PORT" not in os.environ:
            os.environ["MASTER_PORT"] = str(rendezvous.free_port())
        store = td.PrefixStore("default_pg", rendezvous.connect())
        store.set_timeout(TIMEOUT)
        td.init_process_group(
            "nccl" if cuda else "gloo",
            store=store,
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            device_id=torch.device("cuda", local) if cuda else None,
            timeout=TIMEOUT,
        )
    return torch.device("cuda", local) if cuda else torch.device("cpu")


def shutdown() -> None:
    """Leave the process group; without it the DeepSpeed launcher reports exit code -6."""
    for graph in list(graphs):
        graph.close()
    comm = sys.modules.get("deepspeed.comm")
    if comm is not None and comm.is_initialized():
        comm.destroy_process_group()  # also clears its own groups, so that another run can start
    if td.is_initialized():
        td.destroy_process_group()
    _wait_for_gloo()


def _wait_for_gloo() -> None:
    """Wait, at most 10 seconds, until gloo's threads are idle.

    A gloo thread releases the tensors of a collective some time after the caller has returned, and needs the
    interpreter for it.  If the interpreter is finalising, the thread is ended, which aborts the process after a
    successful run.  Destroyed groups join their threads, but DeepSpeed's hooks keep some groups alive.  A thread that
    waits for the interpreter gets it while this one sleeps: one whose state is equal before and after is idle.
    """
    deadline, before = time.monotonic() + 10, None
    while (now := _gloo_threads()) != before or any("State:\tS (sleeping)" not in lines for lines in now.values()):
        if time.monotonic() > deadline:
            break
        before = now
        time.sleep(0.002)


def _gloo_threads() -> dict[str, list[str]]:
    """State and context switches of each gloo thread (on Linux; elsewhere none are found)."""
    found = {}
    for task in Path("/proc/self/task").glob("*"):
        with contextlib.suppress(OSError):  # the thread has ended meanwhile
            if (task / "comm").read_text() == "pt_gloo_runloop\n":
                found[task.name] = [
                    line
                    for line in (task / "status").read_text().splitlines()
                    if line.startswith(("State:", "voluntary_ctxt", "nonvoluntary_ctxt"))
                ]
    return found


def rank() -> int:
    return td.get_rank() if td.is_initialized() else 0


def world() -> int:
    return td.get_world_size() if td.is_initialized() else 1


def local_world() -> int:
    """Ranks on this node, which share its CPU cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", world())))  # torchrun's, DeepSpeed's


def group() -> td.ProcessGroup | None:
    """The group of all ranks, for kernels; None with one rank."""
    return td.group.WORLD if world() > 1 else None


def is_main() -> bool:
    return rank() == 0


def print_main(text: str) -> None:
    """Print on rank 0, at once."""
    if is_main():
        print(text, flush=True)


def shard(rows: int, of: int | None = None) -> slice:
    """The contiguous block of `rows` rows that belongs to this rank (or to rank `of`)."""
    of = rank() if of is None else of
    return slice(rows * of // world(), rows * (of + 1) // world())


def barrier() -> None:
    if world() > 1:
        td.barrier()


def on_main(function: Callable, *args) -> Any:
    """Call `function(*args)` on rank 0; returns its result, or raises its ValueError or OSError, on every rank."""
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = function(*args)
        except (ValueError, OSError) as error:
            outcome[1] = error
    if world() > 1:
        td.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if _backend() == "nccl" else torch.device("cpu")


def _backend() -> str:
    return td.get_backend() if td.is_initialized() else ("nccl" if torch.cuda.is_available() else "gloo")


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.new_empty(world() * x.shape[0], *x.shape[1:])
        td.all_gather_into_tensor(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad, n = grad.contiguous(), grad.shape[0] // world()
        if _backend() == "nccl":
            out = grad.new_empty(n, *grad.shape[1:])
            td.reduce_scatter_tensor(out, grad)
            return out
        grad = grad.clone()  # all_reduce works in place, and autograd may use this buffer elsewhere
        td.all_reduce(grad)
        return grad[rank() * n : (rank() + 1) * n]


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return sum_(x.clone()) / world()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return sum_(grad.clone()) / world()


class _ReplicatedMean(_Mean):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def gather(x: Tensor) -> Tensor:
    """(n, ...) on each rank -> (W n, ...), in the order of ranks.  Differentiable: backward sums over ranks and takes
    this rank's rows."""
    return x if world() == 1 else _Gather.apply(x)


def mean(x: Tensor) -> Tensor:
    """Mean over ranks, differentiable (it is its own adjoint)."""
    return x if world() == 1 else _Mean.apply(x)


def replicated_mean(x: Tensor) -> Tensor:
    """Mean over ranks, from which every rank then computes the same loss.  The gradient is equal on all ranks, so that
    the adjoint, the mean of the gradients, needs no communication.  Wrong where the mean is combined with a rank's own
    samples: use `mean` there."""
    return x if world() == 1 else _ReplicatedMean.apply(x)


@torch.no_grad()
def gather_ragged(x: Tensor) -> Tensor:
    """(n_r, ...) with a different n_r on each rank -> all rows, in the order of ranks.  No gradient."""
    if world() == 1:
        return x
    sizes = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(world())]
    td.all_gather(sizes, torch.tensor([x.shape[0]], device=x.device))
    sizes = [int(s) for s in sizes]
    padded = x.new_zeros(max(sizes), *x.shape[1:])
    padded[: x.shape[0]] = x
    out = _Gather.apply(padded).view(world(), max(sizes), *x.shape[1:])
    return torch.cat([out[r, :n] for r, n in enumerate(sizes)])


@torch.no_grad()
def broadcast_(x: Tensor, source: int = 0) -> Tensor:
    if world() > 1:
        td.broadcast(x, source)
    return x


@torch.no_grad()
def sum_(x: Tensor) -> Tensor:
    if world() > 1:
        td.all_reduce(x)
    return x


@torch.no_grad()
def sync_buffers(module: nn.Module) -> None:
    """Make buffers equal on all ranks: floating-point ones by their mean, others from rank 0.

    Batch norm's running statistics differ by rank after the first step and DeepSpeed never synchronises them.
    """
    if world() == 1:
        return
    for buffer in module.buffers():
        if buffer.is_floating_point():
            sum_(buffer).div_(world())
        else:
            broadcast_(buffer)
