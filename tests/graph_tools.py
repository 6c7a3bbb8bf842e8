"""Trainers of the methods' small cases, and their steps and state, for tests of the captured step.  Not a test."""

import itertools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent / "methods"))
import method_cases as cases

from fastssl import engine, hooks, step
from fastssl.zero import full_state_dict

BATCH = 16


def build(name: str, device: str = "cpu", probe: bool = False, **changes):
    settings = {"norm": cases.CASES[name].norm, **changes.pop("settings", {})}
    run = cases.run(name, batch=BATCH, steps=12, **settings)
    for key, value in changes.items():
        section, field = key.split("_", 1)
        setattr(getattr(run, section), field, value)
    run.hooks = (hooks.LinearProbe(),) if probe else ()
    return cases.build(run, device)


def seeded(t):
    """The batches of a run, drawn with the generator in one state, which dropout and shuffles go on from."""
    source = engine.batches(t)
    first = next(source)
    torch.manual_seed(5)
    return itertools.chain([first], source)


def contents(t) -> dict:
    """Weights, buffers, the optimizer's and the hooks' state."""
    params = [n for n, p in t.method.named_parameters() if p.requires_grad]
    kept = t.deepspeed.optimizer.state
    by_name = dict(t.method.named_parameters())
    return {
        **full_state_dict(t.method),
        **{f"{n} {k}": torch.as_tensor(v).clone() for n in params for k, v in kept[by_name[n]].items()},
        **{f"hook {k}": v.clone() for hook in t.hooks for k, v in hook.state_dict().items()},
    }


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    differ = [k for k in a if not torch.equal(a[k].nan_to_num(7), b[k].nan_to_num(7))]
    assert not differ, differ


def advance(t, source, steps: int, poison=()) -> list:
    """Losses; in the steps of `poison` an fp16 overflow is forced."""
    losses = []
    for _, micro_batches in itertools.islice(source, steps):
        poisoned = t.step in poison
        scale = t.loss_scaler.scale.clone()
        if poisoned:
            t.loss_scaler.value = 2.0**100
        step.step(t, micro_batches)
        if poisoned:
            t.loss_scaler.scale.copy_(scale)
        losses.append(t.scalars["loss"])
    return [float(x) for x in losses]
