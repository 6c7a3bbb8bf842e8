"""Runs `worker(out, *args)` of a test file on several CPU ranks and returns what rank 0 saved to `out`.

A test file that uses it ends with `if __name__ == "__main__": ranks.main(worker)`.  The ranks are started as torchrun
starts them, but by this process, which has imported torch already (torchrun takes seconds for it).
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as td


def launch(file: str, world: int, out: Path, *args: str, env: dict | None = None, timeout: int = 500):
    """Start `file` on `world` ranks; the result of the first, or an error with the end of a failed rank's output."""
    store = td.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # on a free port that stays taken
    env = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # rank 0 connects to the store, too
        "TORCHELASTIC_RESTART_COUNT": "0",
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        **(env or {}),
    }
    with contextlib.ExitStack() as stack:
        ranks = []
        for rank in map(str, range(world)):
            printed = stack.enter_context(tempfile.TemporaryFile("w+"))
            process = subprocess.Popen(
                [sys.executable, "-u", file, str(out), *args],
                env={**env, "RANK": rank, "LOCAL_RANK": rank},
                stdout=printed,
                stderr=subprocess.STDOUT,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)  # before the wait
            ranks.append((process, printed))
        wait(ranks, timeout)
    return torch.load(out, weights_only=False)


def wait(ranks: list, timeout: int) -> None:
    """Until all have ended; AssertionError when one has failed, which the others may wait for."""
    deadline = time.monotonic() + timeout
    while any(process.poll() is None for process, _ in ranks):
        failed = [process.poll() not in (None, 0) for process, _ in ranks]
        if any(failed) or time.monotonic() > deadline:
            break
        time.sleep(0.02)
    for rank, (process, printed) in enumerate(ranks):
        if process.poll():
            printed.seek(0)
            raise AssertionError(f"rank {rank} ended with code {process.poll()}: {printed.read()[-6000:]}")
    assert all(process.poll() == 0 for process, _ in ranks), f"the ranks have not ended after {timeout} s"


def main(worker) -> None:
    worker(*sys.argv[1:])
