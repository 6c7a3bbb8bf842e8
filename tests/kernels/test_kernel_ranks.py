"""Losses over the batch of a process group: two ranks have the loss and gradient of one process, for definitions and
kernels; the loss of the group is the mean over ranks."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import ranks

from fastssl.kernels import infonce, infonce_symmetric, ntxent, sinkhorn
from fastssl.kernels.testing import nan_memory

WORLD, LOCAL, DIM = 2, 33, 32
LABELS = torch.tensor([*range(8), -1, 3, -1] * 6)  # of WORLD * LOCAL samples


def views(dtype):
    g = torch.Generator().manual_seed(0)
    a = torch.randn(WORLD * LOCAL, DIM, generator=g)
    return a.to(dtype), (a + torch.randn(a.shape, generator=g)).to(dtype)


LOSSES = {
    "ntxent": lambda a, b, y, **kw: ntxent(torch.cat([a, b]), 0.2, **kw),
    "decoupled": lambda a, b, y, **kw: ntxent(torch.cat([a, b]), 0.2, decoupled=True, **kw),
    "cold": lambda a, b, y, **kw: ntxent(torch.cat([a, b]), 0.01, **kw),
    "labels": lambda a, b, y, **kw: ntxent(torch.cat([a, b]), 0.2, labels=y, **kw),
    "batch": lambda a, b, y, **kw: infonce(a, b, None, 0.2, **kw),
    "both": lambda a, b, y, **kw: infonce_symmetric(a, b, 0.2, **kw),
    "sinkhorn": lambda a, b, y, **kw: (sinkhorn(torch.nn.functional.normalize(a, dim=1), 0.2, **kw) * b).sum(1).mean(),
}
CASES = [(name, impl) for name in LOSSES for impl in ("reference", "triton")]


def compute(name, impl, group, part):
    """The loss, and its gradient with respect to both views of the samples `part`."""
    a, b = (x[part].clone().requires_grad_() for x in views(torch.float64 if impl == "reference" else torch.float16))
    with nan_memory():
        loss = LOSSES[name](a, b, LABELS[part], impl=impl, group=group)
        grads = torch.autograd.grad(loss, (a, b), allow_unused=True)
    return loss.detach().double(), [torch.zeros_like(a) if g is None else g.double() for g in grads]


def worker(out):
    import torch.distributed as td

    td.init_process_group("gloo")
    rank = td.get_rank()
    results = {}
    for name, impl in CASES:
        loss, grads = compute(name, impl, td.group.WORLD, slice(rank * LOCAL, (rank + 1) * LOCAL))
        td.all_reduce(loss)
        everyone = [torch.empty_like(torch.stack(grads)) for _ in range(WORLD)]
        td.all_gather(everyone, torch.stack(grads))
        # the mean over ranks: of the loss, and of the gradients of parameters, which each rank's rows reach once
        results[name, impl] = loss / WORLD, torch.cat(everyone, 1) / WORLD
    if rank == 0:
        torch.save(results, out)
    td.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return ranks.launch(__file__, WORLD, tmp_path_factory.mktemp("ranks") / "results.pt", env={"TRITON_INTERPRET": "1"})


@pytest.mark.parametrize("name, impl", CASES)
def test_two_ranks_equal_one_process(two_ranks, name, impl):
    if impl == "reference":
        loss, grads = compute(name, impl, None, slice(None))
        tolerance = 1e-12
    else:  # against the definition: the kernels' own rounding, in float16
        loss, grads = compute(name, "reference", None, slice(None))
        tolerance = 5e-3 if name != "cold" else 5e-2
    ours_loss, ours_grads = two_ranks[name, impl]
    grads = torch.stack(grads)
    assert abs(ours_loss - loss) <= tolerance * max(abs(loss), 1)
    assert (ours_grads - grads).norm() <= tolerance * grads.norm()


if __name__ == "__main__":
    ranks.main(worker)
