"""On a GPU a replay of the captured step gives the bits of the step itself.

On a GPU machine:  python -m pytest -m gpu tests/test_graph_gpu.py
"""

import dataclasses
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "methods"))
import method_cases as cases
from graph_tools import BATCH, advance, assert_same, build, contents, seeded

from fastssl import dist, engine, hooks

FIRST = {"simclr": "lars", "byol": "lars", "moco": "sgd", "barlow": "sgd", "dino": "adamw"}
REST = {n: "sgd" for n in cases.CASES if n not in FIRST and n not in ("deepcluster pic", "odc", "lejepa")}


def build_gpu(name: str, optimizer: str, graph: str, precision: str = "fp16", skip: int = 0):
    run = cases.run(name, norm=cases.CASES[name].norm, batch=BATCH, steps=40)
    run.hooks = (hooks.LinearProbe(),)
    run.deterministic, run.optim.precision, run.speed.graph, run.optim.name = True, precision, graph, optimizer
    run.optim.schedule, run.optim.skip_nonfinite = "cosine", skip
    if optimizer == "adamw":
        run.optim.lr, run.optim.weight_decay_end = 1e-3, 1e-2
    if run.backbone.norm == "gn":
        run.backbone = dataclasses.replace(run.backbone, norm="bn")
    return cases.build(run, "cuda")


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:method.shuffle=True has no effect on one GPU:UserWarning")  # with batch norm
@pytest.mark.parametrize("name", [*FIRST, *REST])
def test_a_replay_equals_the_eager_step_bit_for_bit(name):
    made = {}
    for graph in ("off", "on"):
        t = build_gpu(name, (FIRST | REST)[name], graph)
        source = seeded(t)
        losses = advance(t, source, 10, poison=(1, 7))
        made[graph] = losses, contents(t), torch.cuda.get_rng_state(), t.loss_scaler.state_dict()
        if graph == "on":
            assert t.capturable_step.reason is None, t.capturable_step.reason
            assert t.capturable_step._captured is not None
        torch.cuda.synchronize()
        start = time.perf_counter()
        advance(t, source, 8)
        print(f"{name}: graph {graph}, {(time.perf_counter() - start) / 8e-3:.2f} ms a step")
    (a, b) = made.values()
    assert a[0] == b[0] and a[3] == b[3] and torch.equal(a[2], b[2])
    assert_same(a[1], b[1])


@pytest.mark.gpu
def test_skipped_steps_are_the_same_with_a_graph():
    made = []
    for graph in ("off", "on"):
        t = build_gpu("simclr", "lars", graph, skip=2)
        made.append((advance(t, seeded(t), 10, poison=(1, 7)), contents(t)))
        assert (t.capturable_step.reason is None) == (graph == "on"), t.capturable_step.reason
    assert made[0][0] == made[1][0]
    assert_same(made[0][1], made[1][1])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["simclr", "byol", "dino", "mae"])
def test_micro_batches_have_the_losses_of_one_batch_on_a_gpu(name):
    """Within the rounding of TF32; tests/methods/test_accumulation.py has the exact comparison, on a CPU."""
    made = []
    for micro in (None, BATCH // 4):
        t = build(name, "cuda", optim_lr=2.0**-8, speed_micro_batch=micro, settings={"norm": False})
        made.append(torch.tensor(advance(t, seeded(t), 4)))
    torch.testing.assert_close(*made, rtol=1e-2, atol=0)


@pytest.mark.gpu
def test_collectives_are_captured(monkeypatch):
    """NCCL's, in the group of one rank, in which `dist` otherwise calls none."""
    monkeypatch.setattr(dist, "sum_", lambda x: torch.distributed.all_reduce(x) or x)
    monkeypatch.setattr(dist, "gather", lambda x: dist._Gather.apply(x))
    monkeypatch.setattr(dist, "group", lambda: torch.distributed.group.WORLD)
    made = []
    for graph in ("off", "on"):
        t = build_gpu("simclr", "lars", graph)
        made.append((advance(t, seeded(t), 8, poison=(1, 6)), contents(t)))
        assert (t.capturable_step.reason is None) == (graph == "on"), t.capturable_step.reason
    dist.shutdown()
    assert t.capturable_step._captured is None
    assert made[0][0] == made[1][0]
    assert_same(made[0][1], made[1][1])


@pytest.mark.gpu
def test_a_run_resumes_to_the_same_bits(tmp_path):
    """With dropout, whose random numbers a graph counts itself."""
    import safetensors.torch

    from fastssl.checkpoint import disk

    found = []
    for folder, graph, resume in (("off", "off", False), ("on", "on", False), ("on", "on", True)):
        run = cases.run("relative_loc", norm=True, batch=BATCH, steps=13, dropout=0.5)
        run.name, run.log.root, run.deterministic, run.speed.graph = folder, str(tmp_path), True, graph
        run.log.every, run.log.checkpoint_steps, run.log.keep, run.log.probe = 1, 8, 3, True
        t = engine.fit(run, resume=resume, loader=cases.loader(run, "cuda"))
        assert (t.capturable_step.reason is None) == (graph == "on"), t.capturable_step.reason
        last = disk.newest(t.folder)
        found.append(safetensors.torch.load_file(last / "weights.safetensors"))
        shutil.rmtree(last)
    for other in found[1:]:
        assert_same(found[0], other)


@pytest.mark.gpu
def test_a_failed_capture_leaves_the_eager_step(capsys):
    made = []
    for graph in ("off", "on"):
        t = build_gpu("relative_loc", "sgd", graph)
        loss = t.method.loss
        t.method.loss = lambda out, batch, loss=loss: {k: v + 0 * v.item() for k, v in loss(out, batch).items()}
        torch.manual_seed(5)
        advance(t, engine.batches(t), 8)
        made.append(contents(t))
    assert "capture failed" in t.capturable_step.reason and capsys.readouterr().out.count("capture failed") == 1
    assert_same(*made)
