"""FLOPs of a step: those of its forward and backward, counted without a trace in the run."""

import contextlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "methods"))
import method_cases as cases
import ranks

from fastssl.meters import Flops

MICRO = {"simclr": 16, "moco": 16, "swav queue": 16, "byol": 4}  # images of a micro-batch, of 16 of a batch


def trainer(name: str, micro: int, zero: int = 0):
    from fastssl import engine

    t = cases.build(cases.run(name, norm=cases.CASES[name].norm, micro=micro, zero=zero))
    t.meter.peak = 1e12
    return t, [micro_batches for _, micro_batches in engine.batches(t)]


@pytest.mark.parametrize("name", MICRO)
def test_flops_are_those_of_a_step(name, monkeypatch):
    from fastssl.step import count_flops, step

    t, (first, _) = trainer(name, MICRO[name])
    before = {k: v.clone() for k, v in t.method.state_dict().items()}
    generator = torch.get_rng_state()
    count_flops(t, first)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(v, before[k]) for k, v in t.method.state_dict().items())
    assert all(p.grad is None for p in t.method.parameters())

    counter = Flops()
    counting = {"forward": counter, "backward": counter}
    monkeypatch.setattr(t.meter, "phase", lambda name: counting.get(name, contextlib.nullcontext()))
    step(t, first)
    assert t.meter.flops == counter.total > 1e6


def test_views_are_those_of_seed_epoch_and_sample_or_position():
    from fastssl.kernels.augment import make_views
    from fastssl.step import batch_views

    t, _ = trainer("simclr", 16)
    batch, recipe = next(t.loader.epoch(2)), t.run.data.views
    for position, key in ((None, batch.index), (32, torch.arange(32, 48))):
        got = batch_views(t, replace(batch, position=position))
        want = make_views(batch.pixels, batch.sizes, key, recipe, seed=t.run.seed, epoch=2)
        assert len(got) == len(recipe) and all(map(torch.equal, got, want))
    (other,) = batch_views(t, batch, (replace(recipe[0], size=8),))
    assert other.shape == (16, 3, 8, 8)


def test_compiled_code_is_counted_eagerly_and_compiled_afterwards():
    """Dynamo never again compiles a function that it met under the counter."""
    from fastssl.step import count_flops, step

    t, (first, second) = trainer("simclr", 16)
    graphs = []
    t.method.forward = torch.compile(t.method.forward, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    count_flops(t, first)
    assert not graphs and t.meter.flops > 1e6
    step(t, second)
    assert graphs


@pytest.mark.parametrize("inside", [False, True])
def test_a_hook_that_logs_the_loss_of_the_method_is_refused(inside):
    """Inside and outside the part of the step that a CUDA graph captures."""
    from fastssl import hooks
    from fastssl.step import step

    class Zero(hooks.Hook):
        capturable = inside

        def after_step(self, t, out, batch):
            t.log({"loss": torch.zeros(())})

    t, (first, _) = trainer("simclr", 16)
    t.hooks, t.run.speed.graph = [Zero()], "on"
    with pytest.raises(ValueError, match="the hook Zero has logged 'loss', which the method"):
        step(t, first)


def worker(out: str) -> None:
    """Losses of two steps after FLOPs were counted, and without that, at each ZeRO stage; losses of a probe in the step
    and after it."""
    from fastssl import dist, hooks
    from fastssl.step import count_flops, hooks_in_graph, step

    dist.init("cpu")
    found = {}
    for zero in range(4):
        for counted in (False, True):
            t, steps = trainer("moco", 4, zero)
            if counted:
                count_flops(t, steps[0])
            losses = []
            for micro_batches in steps:
                step(t, micro_batches)
                losses.append(dist.mean(t.scalars["loss"]).item())
            found[zero, counted] = losses, t.meter.flops
    for graph in ("auto", "on"):
        t, steps = trainer("moco", 8)
        t.hooks, t.run.speed.graph = [hooks.LinearProbe()], graph
        t.hooks[0].before_epoch(t)
        for micro_batches in steps:
            step(t, micro_batches)
        found["probe", len(hooks_in_graph(t))] = dist.mean(t.scalars["probe_loss"]).item(), t.hooks[0].state_dict()
    if dist.is_main():
        torch.save(found, out)
    dist.shutdown()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return ranks.launch(__file__, 2, tmp_path_factory.mktemp("step") / "out.pt")


def test_a_probe_in_the_step_sees_the_batch_of_all_ranks(two_ranks):
    (after, after_state), (inside, inside_state) = two_ranks["probe", 0], two_ranks["probe", 1]
    assert after == inside > 0
    assert all(torch.equal(value, inside_state[name]) for name, value in after_state.items())


def test_counting_changes_nothing_at_any_zero_stage(two_ranks):
    found = two_ranks
    for zero in range(4):
        (plain, none), (losses, flops) = found[zero, False], found[zero, True]
        assert losses == plain and none is None and flops == found[0, True][1]


if __name__ == "__main__":
    ranks.main(worker)
