"""Runs `worker(out, *args)` of a test file on several CPU ranks and returns what rank 0 saved to `out`.

A test file that uses it ends with `if __name__ == "__main__": ranks.main(worker)`.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch


def launch(file: str, world: int, out: Path, *args: str, env: dict | None = None, timeout: int = 500):
    """Start `file` on `world` ranks; the result of the first, or an error with the end of its output."""
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **(env or {})}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={world}",
        file,
        str(out),
        *args,
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return torch.load(out, weights_only=False)


def main(worker) -> None:
    worker(*sys.argv[1:])
