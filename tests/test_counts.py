"""Counts in place of times, the same on every machine: what a step of each method asks of the device, of the link to it
and of the decoder.  A change that raises one fails; one that lowers one may lower the table:

    python tests/test_counts.py        prints the table as it is now
"""

import contextlib
import itertools
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "methods"))
import method_cases as cases
from step_modes import Counts, NoCopies

from fastssl import dist, engine, hooks, step
from fastssl.loader import Loader
from fastssl.sampler import Sampler

BATCH = 16
NAMES = [n for n in cases.CASES if n != "deepcluster pic"]
PROBE_OPS = 74  # the online probe's

# Calls of operations in one step from views to updated weights, with SGD, of the networks of method_cases (a proxy for
# kernel launches: without the views, and with the losses and the optimizer in plain PyTorch), under torch 2.11.
OPS = {
    "simclr": 217,
    "moco": 381,
    "moco symmetric": 622,
    "byol": 595,
    "simsiam": 390,
    "mocov3": 625,
    "mocov3 vit": 1121,
    "barlow": 365,
    "vicreg": 394,
    "vicreg wide": 422,
    "nnclr": 521,
    "dino": 592,
    "swav": 424,
    "swav queue": 460,
    "supcon": 221,
    "dcl": 218,
    "densecl": 351,
    "supervised": 146,
    "mae": 518,
    "lejepa": 360,
    "rotation": 148,
    "npid": 331,
    "npid shared": 333,
    "deepcluster": 172,
    "odc": 238,
    "deepclusterv2": 320,
    "relative_loc": 274,
}


def build(name: str, probe: bool):
    dist.init()
    run = cases.run(name, batch=BATCH, steps=12, norm=cases.CASES[name].norm)
    run.hooks = (hooks.LinearProbe(),) if probe else ()
    run.speed.graph = "on"  # with the probe inside
    return cases.build(run)


def count(name: str, probe: bool = False):
    """The third step of a method: its counts, its trainer and its batch."""
    t = build(name, probe)
    source = engine.batches(t)
    for _, micro_batches in itertools.islice(source, 2):  # memory that stays is made by now
        step.step(t, micro_batches)
        t.scalars = {}
    _, (batch,) = next(source)
    views = step.batch_views(t, batch)  # the reference reads; the kernel that takes its place on a GPU does not
    t.step_inputs.write(batch, t.deepspeed.optimizer.param_groups, 0.5)
    made, counts = step.batch_views, Counts()
    static = not hasattr(t.method, "not_capturable")
    step.batch_views = lambda *_: views
    try:
        with counts, NoCopies() if static else contextlib.nullcontext():
            out = step.static_step(t, batch, lambda name: contextlib.nullcontext())
    finally:
        step.batch_views = made
    del out
    return counts, t, batch


@pytest.mark.parametrize("name", NAMES)
def test_a_step_has_no_more_operations_reads_and_copies_than_recorded(name):
    counts, t, batch = count(name)
    if not hasattr(t.method, "not_capturable"):  # those are not captured, and say why
        assert counts.reads == []
    assert counts.survivors() == []  # state is written in place, at addresses that a graph may keep
    sent = (
        sum(getattr(batch, key).nbytes for key in ("pixels", "sizes", "index", "label")) + t.step_inputs._packed.nbytes
    )
    groups = len(t.deepspeed.optimizer.param_groups)
    # uint8 pixels once whatever the number of views, height and width, number, label; a step's numbers in one copy
    assert sent / BATCH <= 3 * cases.SIDE**2 + 8 + 8 + 8 + 8 * (4 + 2 * groups) / BATCH
    assert groups == 1
    if torch.__version__.startswith("2.11."):
        assert counts.ops <= OPS.get(name, 0), f"a new case: record {counts.ops}" if name not in OPS else name


def test_a_probe_in_a_step_has_no_more_operations_than_before():
    counts, t, _ = count("supervised", probe=True)
    assert step.hooks_in_graph(t) == t.hooks
    assert counts.reads == [] and counts.survivors() == []
    if torch.__version__.startswith("2.11."):
        assert counts.ops <= OPS["supervised"] + PROBE_OPS


def test_operations_reads_and_kept_tensors_are_counted():
    x, kept = torch.ones(3), []
    with Counts() as counts:
        y = x + 1  # 1
        y.mul_(2)  # 2, in place
        y.view(1, 3)[:, :2].t()
        torch.empty(5)
        kept.append(y.sum())  # 3, and stays
        if y[0] > 0:  # 4, and is read: 5
            pass
        del y
    assert counts.ops == 5
    assert len(counts.reads) == 1 and "_local_scalar_dense" in counts.reads[0]
    assert counts.survivors() == ["aten.sum.default ()"]


@pytest.mark.parametrize("micro", [1, 2])
def test_an_image_is_decoded_once(beton, micro):
    """In an epoch, whatever the number of its views (the loader knows none); ahead of time, and not again."""
    loader = Loader(beton, 16, Sampler(micro_per_step=micro), workers=2, device="cpu")
    decode, rows = loader._beton.decode, []
    loader._beton.decode = lambda which, *where: (rows.extend(which.tolist()), decode(which, *where))
    for epoch in range(2):
        seen = [i for batch in loader.epoch(epoch) for i in batch.index.tolist()]
        assert len(seen) == 16 * loader.steps and sorted(rows) == sorted(seen)
        rows.clear()


def test_a_resident_set_is_decoded_once_a_run(beton, monkeypatch):
    from fastssl.decode import BetonReader

    decode, rows = BetonReader.decode, []
    monkeypatch.setattr(
        BetonReader, "decode", lambda self, which, *where: (rows.extend(which.tolist()), decode(self, which, *where))
    )
    loader = Loader(beton, 16, workers=2, device="cpu", resident=True)
    assert sum(len(batch.index) for epoch in range(2) for batch in loader.epoch(epoch)) == 2 * 16 * loader.steps
    assert sorted(rows) == list(range(loader.samples))


if __name__ == "__main__":
    for name in NAMES:
        counts, t, _ = count(name)
        print(f'    "{name}": {counts.ops},', "#", counts.survivors(), counts.reads[:3] or "", flush=True)
