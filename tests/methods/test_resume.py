"""Every method, stopped in the middle of an epoch and resumed, has the same losses, weights, optimizer and random
states, bit for bit."""

import gc
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import method_cases as cases
import ranks

STEPS, SAVED, BATCH = 13, 10, 16  # SAVED is in the middle of an epoch of 72 // 16 steps
DROPOUT = {"odc": {"dropout": 0.5}, "relative_loc": {"dropout": 0.5}}


def log_of(folder: Path) -> list[dict]:
    return [r for r in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if "loss" in r]


def train(name: str, root: Path, zero: int = 0) -> dict:
    """Logs and weights of a run without interruption, and of one resumed from its checkpoint at step SAVED."""
    import safetensors.torch

    from fastssl import dist, engine
    from fastssl.checkpoint import disk

    run = cases.run(name, norm=cases.CASES[name].norm, batch=BATCH, steps=STEPS, **DROPOUT.get(name, {}))
    run.name, run.log.root, run.deterministic, run.speed.zero = f"{name}{zero}", str(root), True, zero
    run.log.every, run.log.checkpoint_steps, run.log.keep = 1, SAVED, 2
    found = {}
    for kind in ("whole", "resumed"):
        t = engine.fit(run, resume=kind == "resumed", device="cpu", loader=cases.loader(run))
        last = disk.newest(t.folder)
        assert last.name == f"step_{STEPS:08d}"
        state = {
            k: v for file in sorted(last.glob("*.safetensors")) for k, v in safetensors.torch.load_file(file).items()
        }
        found[kind] = {"log": log_of(t.folder), "state": state}
        dist.barrier()
        if dist.is_main():
            shutil.rmtree(last)
        dist.barrier()
    return found


SHARDED = {"odc": ("bank", (12,)), "deepclusterv2": ("memory", (2, 12))}  # the table and the shape of its rows


def sharded(root: str, resume: bool) -> dict:
    """The state of each method with a sharded table: after five steps, or loaded from their checkpoint."""
    from fastssl import engine
    from fastssl.zero import full_state_dict

    states = {}
    for name in SHARDED:
        run = cases.run(name, batch=BATCH, steps=5)
        run.name, run.log.root = name, root
        t = engine.fit(run, resume=resume, device="cpu", loader=cases.loader(run))
        states[name] = full_state_dict(t.method)
    return states


def worker(out: str, root: str) -> None:
    """The first launch has two ranks and writes what all load."""
    from fastssl import dist, engine  # noqa: F401

    gc.freeze()  # DeepSpeed collects garbage at every start; what the imports have made stays
    dist.init("cpu")
    found = {}
    if dist.world() == 2:
        found["written"] = sharded(root, resume=False)
        found |= {stage: train("moco", Path(root), stage) for stage in (1, 2, 3)}
    found["read"] = sharded(root, resume=True)
    if dist.world() == 1:
        found |= {name: train(name, Path(root)) for name in cases.CASES}
    if dist.is_main():
        torch.save(found, out)
    dist.shutdown()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    return {world: ranks.launch(__file__, world, folder / f"{world}.pt", str(folder)) for world in (2, 1, 4)}


@pytest.mark.parametrize("name", cases.CASES)
def test_resume_in_mid_epoch_gives_the_same_bits(runs, name):
    assert_equal_runs(**runs[1][name])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_resume_at_every_zero_stage_gives_the_same_bits(runs, stage):
    assert_equal_runs(**runs[2][stage])


def assert_equal_runs(whole: dict, resumed: dict) -> None:
    assert [r["loss"] for r in resumed["log"]] == [r["loss"] for r in whole["log"]]
    assert len(whole["log"]) == STEPS
    assert whole["state"].keys() == resumed["state"].keys()
    different = [key for key, value in whole["state"].items() if not torch.equal(value, resumed["state"][key])]
    assert not different


@pytest.mark.parametrize("world", [1, 2, 4])
def test_sharded_table_loads_on_any_number_of_ranks(runs, world):
    """Written by two ranks."""
    written, read = runs[2]["written"], runs[world]["read"]
    for name, (table, shape) in SHARDED.items():
        assert written[name][table].shape == (cases.SAMPLES, *shape)
        torch.testing.assert_close(written[name][table].norm(dim=-1), torch.ones(cases.SAMPLES, *shape[:-1]))
        assert read[name].keys() == written[name].keys()
        assert all(torch.equal(read[name][key], value) for key, value in written[name].items())


if __name__ == "__main__":
    ranks.main(worker)
