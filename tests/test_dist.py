"""The end of a process that was a rank."""

import os
import subprocess
import sys

RANK = """
import os, sys
import torch, torch.distributed as td
from fastssl import dist, rendezvous

codes = []
for _ in range(4):
    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(rendezvous.free_port()))
    child = os.fork()
    if not child:
        sys.setswitchinterval(1000)  # a thread that needs the interpreter gets it when this one sleeps
        dist.init("cpu")
        sys.kept = td.group.WORLD  # as DeepSpeed's hooks keep it: destroying the group does not join its threads
        sys.kept.allreduce_coalesced([torch.ones(1) for _ in range(20000)]).wait()  # which drop them one by one
        dist.shutdown()
        sys.exit()
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(codes)
"""


def test_a_rank_does_not_abort_while_gloo_drops_the_tensors_of_its_last_collective():
    """Without dist's wait seven of eight did so, with exit code -6."""
    done = subprocess.run(
        [sys.executable, "-c", RANK],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.stdout.strip() == "[0, 0, 0, 0]", done.stdout + done.stderr
