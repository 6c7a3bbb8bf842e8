"""Methods with `mean_loss`: one forward per micro-batch, with the same result as the gradient cache."""

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
    """One step: its gradients, buffers, scalars and outputs."""
    grads, update = {}, t.deepspeed.optimizer.step

    def record_and_update():
        grads.update({n: p.grad.clone() for n, p in t.method.named_parameters() if p.grad is not None})
        return update()

    t.deepspeed.optimizer.step = record_and_update
    _, micro_batches = next(engine.batches(t))
    torch.manual_seed(5)  # of dropout and shuffles
    out = step.step(t, micro_batches)
    return {
        **grads,
        **{n: b.clone() for n, b in t.method.named_buffers()},
        **{f"out {n}": v for n, v in out.items()},
        **{f"scalar {n}": torch.as_tensor(v) for n, v in t.scalars.items()},
        "rng": torch.get_rng_state(),
    }


@pytest.mark.parametrize("name", CASES)
def test_mean_loss_needs_one_forward_per_micro_batch(name):
    t = build(name)
    calls, forward = [], t.method.forward
    t.method.forward = lambda *args: calls.append(torch.is_grad_enabled()) or forward(*args)
    _, micro_batches = next(engine.batches(t))
    calls.clear()  # of the features that are clustered
    step.step(t, micro_batches)
    count = BATCH // MICRO
    assert calls == ([True] * count if name in MEANS else [False] * count + [True] * count)


@pytest.mark.parametrize("name", sorted(MEANS))
def test_mean_loss_and_gradient_cache_give_the_same_step(name):
    """Gradients, running statistics, buffers after `after_step`, scalars, outputs and the state of the random
    generator, with batch norm in the heads and dropout."""
    head = name.split(",")[0]
    changes = {"norm": True} if cases.CASES[head].norm else {}
    changes |= {"dropout": 0.5} if name in ("odc", "relative_loc") else {}
    results = []
    for cached in (True, False):
        t = build(name, **changes)
        if cached:
            t.method.mean_loss = False
        results.append(one_step(t))
    want, got = results
    assert got.keys() == want.keys() and len(got) > 15
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-4, atol=2e-6, msg=lambda m, k=key: f"{k}: {m}")
    running = [k for k in want if "running" in k]
    assert len(running) > 1 or not changes.get("norm")
    assert all(torch.equal(got[k], want[k]) for k in running)
