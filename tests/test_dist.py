"""Differentiable collectives, and the end of a process that was a rank."""

import os
import subprocess
import sys

import torch

from fastssl import dist

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


def test_means_and_gathered_gradients_leave_their_inputs_as_they_are(monkeypatch):
    """On two ranks with equal values; autograd may use the same tensors elsewhere."""
    monkeypatch.setattr(dist, "world", lambda: 2)
    monkeypatch.setattr(dist, "rank", lambda: 1)
    monkeypatch.setattr(dist.td, "all_reduce", lambda x: x.mul_(2))
    monkeypatch.setattr(dist.td, "all_gather_into_tensor", lambda out, x: out.copy_(torch.cat([x, x])))
    x = torch.arange(3.0, requires_grad=True)
    for function, ranks, own in ((dist.mean, 1, 1.0), (dist.gather, 2, 2.0)):
        out = function(x)
        assert torch.equal(out, torch.arange(3.0).repeat(ranks)) and x.tolist() == [0, 1, 2], function
        grad = torch.ones(len(out))
        (of_x,) = torch.autograd.grad(out, x, grad)
        assert torch.equal(of_x, torch.full((3,), own)) and grad.tolist() == [1.0] * len(out), function
