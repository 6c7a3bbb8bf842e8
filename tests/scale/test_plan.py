"""The predicted memory of a rank against the bytes that are allocated, at every ZeRO stage."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "methods"))
import method_cases
import ranks

from fastssl import plan
from fastssl.doctor import main

RUNS = {  # momentum encoder and queue; a sharded table; two tensors of the optimizer
    "moco": {"name": "sgd"},
    "odc": {"name": "lars"},
    "dino": {"name": "adamw", "momentum": 0.9},
}


def make_run(case: str, stage: int):
    run = method_cases.run(case, batch=16, steps=1, zero=stage)
    run.optim = replace(run.optim, **RUNS[case])
    return run


def allocated(t) -> int:
    """Bytes of the storages of all parameters, copies, optimizer states, buffers and tables of this rank."""
    from fastssl import zero
    from fastssl.sharded_table import ShardedTable

    targets = [target for target, _ in zero.partitions(t.deepspeed)]
    tensors = [getattr(p, "ds_tensor", p) for p in t.method.parameters()] + list(t.method.buffers()) + targets
    tensors += [v for target in targets for v in t.deepspeed.basic_optimizer.state[target].values() if v.ndim]
    tensors += [m._storage for m in t.method.modules() if isinstance(m, ShardedTable)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors if x.numel()}
    return sum(storages.values())


def worker(out: str) -> None:
    from fastssl import dist, engine
    from fastssl.step import step

    dist.init("cpu")
    found = {}
    for case in RUNS:
        for stage in range(4):
            run = make_run(case, stage)
            t = method_cases.build(run)
            for _, micro_batches in engine.batches(t):
                step(t, micro_batches)
            found[case, stage] = allocated(t)
            if stage:
                found[case, stage, "bucket"] = t.deepspeed.optimizer.reduce_bucket_size
    if dist.is_main():
        torch.save(found, out)
    dist.shutdown()


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    return ranks.launch(__file__, 2, tmp_path_factory.mktemp("plan") / "out.pt")


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("case", RUNS)
def test_the_states_of_a_rank_are_predicted(measured, case, stage):
    run = make_run(case, stage)
    method = plan.build_method(run, method_cases.SAMPLES, "meta")
    if case == "odc":  # the table is cut by the ranks that there are when the method is built: one, here
        assert any(p.is_meta for p in method.parameters())
    predicted = plan.memory(method, run, stage, ranks=2)
    states = predicted.parameters + predicted.optimizer + predicted.buffers
    assert states == pytest.approx(measured[case, stage], rel=0.01)
    if stage:
        assert predicted.reduction == 4 * measured[case, stage, "bucket"]


def test_zero_3_needs_less_memory_than_zero_0(measured):
    for case in RUNS:
        assert measured[case, 0] > 1.2 * measured[case, 3]


@pytest.mark.parametrize("case", ["simclr", "mae", "swav"])
def test_activations_grow_by_the_same_with_every_image(case):
    run = method_cases.run(case)
    each, beside = plan.activations(run, method_cases.SAMPLES)
    method = plan.build_method(run, method_cases.SAMPLES, "cpu").train()
    assert each > 1000
    assert beside + 16 * each == pytest.approx(plan._saved_bytes(method, run, 16), rel=0.05)


CONFIG = """
from fastssl import views
from fastssl.config import Backbone, Data, Optim, Run
from fastssl.methods import moco

def get_config():
    return Run(method=moco.Config(queue=4096), backbone=Backbone("resnet18"),
               data=Data(train="x.beton", views=views.moco_v2(64)), optim=Optim(batch=256))
"""


def test_the_command_prints_a_row_for_each_stage(tmp_path, capsys):
    (tmp_path / "c.py").write_text(CONFIG)
    assert main(["--plan", str(tmp_path / "c.py"), "--gpus", "8", "optim.name=adamw", "optim.lr=0.001"]) == 0
    out = capsys.readouterr().out
    assert "GiB on each of 8 GPUs: 2" in out and "adamw, 1,281,167 samples" in out
    rows = [line.split() for line in out.splitlines() if line.strip()[:1] in "0123" and line.strip()]
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    assert float(rows[0][2]) > float(rows[1][2])  # the optimizer's state is divided
    assert main(["--plan", str(tmp_path / "c.py"), "--gpus", "7"]) == 2
    assert "--gpus 7: must be 1 or more and divide optim.batch=256" in capsys.readouterr().err


if __name__ == "__main__":
    ranks.main(worker)
