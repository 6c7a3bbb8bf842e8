"""Micro-batches of a loss that is a mean over samples: one forward each, and what the gradient cache gives."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import method_cases as cases

from fastssl import dist, engine, step

BATCH, MICRO = 16, 4  # images
MEANS = {
    "moco",
    "moco symmetric",
    "byol",
    "simsiam",
    "dino",
    "densecl",
    "supervised",
    "mae",
    "rotation",
    "npid",
    "npid shared, any negative",
    "deepcluster",
    "deepcluster pic",
    "odc",
    "deepclusterv2",
    "relative_loc",
}
CASES = [*cases.CASES, "npid shared, any negative"]


def build(name: str, **changes):
    name, _, rest = name.partition(", ")
    run = cases.run(name, batch=BATCH, micro=MICRO, **({"ensure_neg": False} if rest else {}), **changes)
    dist.init("cpu")
    return cases.build(run)


def one_step(t) -> dict:
    """One step; gradients, buffers, scalars and outputs."""
    found, take = {}, t.ds.optimizer.step

    def spy():
        found.update({n: p.grad.clone() for n, p in t.method.named_parameters() if p.grad is not None})
        return take()

    t.ds.optimizer.step = spy
    _, micro_batches = next(engine.batches(t))
    torch.manual_seed(5)  # of dropout and shuffles
    out = step.step(t, micro_batches)
    return {
        **found,
        **{n: b.clone() for n, b in t.method.named_buffers()},
        **{f"out {n}": v for n, v in out.items()},
        **{f"scalar {n}": torch.as_tensor(v) for n, v in t.scalars.items()},
        "rng": torch.get_rng_state(),
    }


@pytest.mark.parametrize("name", CASES)
def test_a_mean_over_samples_needs_one_forward_a_micro_batch(name):
    t = build(name)
    calls, forward = [], t.method.forward
    t.method.forward = lambda *args: calls.append(torch.is_grad_enabled()) or forward(*args)
    _, micro_batches = next(engine.batches(t))
    calls.clear()  # of the features that are clustered
    step.step(t, micro_batches)
    count = BATCH // MICRO
    assert calls == ([True] * count if name in MEANS else [False] * count + [True] * count)


@pytest.mark.parametrize("name", sorted(MEANS))
def test_it_is_what_the_gradient_cache_gives(name):
    """With batch norm in the heads, dropout where the method has it: gradients, running statistics, what `after_step`
    moved, logged scalars, outputs and the generator's state."""
    head = name.split(",")[0]
    changes = {"norm": True} if cases.CASES[head].norm else {}
    changes |= {"dropout": 0.5} if name in ("odc", "relative_loc") else {}
    made = []
    for cached in (True, False):
        t = build(name, **changes)
        if cached:
            t.method.mean_loss = False
        made.append(one_step(t))
    want, got = made
    assert got.keys() == want.keys() and len(got) > 15
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-4, atol=2e-6, msg=lambda m, k=key: f"{k}: {m}")
    running = [k for k in want if "running" in k]
    assert len(running) > 1 or not changes.get("norm")
    assert all(torch.equal(got[k], want[k]) for k in running)
