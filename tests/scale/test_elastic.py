"""A run that continues on another number of ranks, at another ZeRO stage and in another memory format: the same state
to the last bit, and from there the same losses but for rounding."""

import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "methods"))
import method_cases
import ranks

STEPS, SAVED, BATCH = 9, 6, 16  # SAVED is in the middle of an epoch of 72 // 16 steps
# What a checkpoint can hold: a momentum encoder, a queue, a probe; a sharded table, LARS; AdamW, a group that the
# optimizer has not moved yet
OPTIMIZERS = {
    "moco": {"name": "sgd"},
    "odc": {"name": "lars", "lr": 0.5, "paramwise": {"ndim<=1": {"weight_decay": 0.0, "lars_exclude": True}}},
    "dino": {"name": "adamw", "lr": 1e-3, "momentum": 0.9, "clip": 1.0, "clip_each": True},
}
METHOD = {"dino": {"freeze_epochs": 2}}
# Pixels of the small crops: with 8, group norm in the last stage has two values in a group.  It gives their order, +1
# and -1, and where they are nearly equal a rounding error changes the losses.
SMALL_CROPS = {8: 12}


class Change(NamedTuple):
    case: str
    stage: int
    world: int
    new_stage: int
    new_world: int

    def __str__(self):
        return f"{self.case}: ZeRO {self.stage} x {self.world} -> ZeRO {self.new_stage} x {self.new_world}"


SOME = [
    Change("moco", 0, 1, 1, 2),
    Change("moco", 2, 2, 0, 1),
    Change("moco", 2, 2, 3, 2),
    Change("odc", 1, 2, 3, 1),
    Change("odc", 1, 2, 2, 2),
    Change("dino", 3, 2, 0, 1),
    Change("dino", 3, 2, 2, 2),
    Change("dino", 0, 1, 3, 2),
]
ALL = [
    Change(case, a, w, b, v)
    for case in OPTIMIZERS
    for a in range(4)
    for b in range(4)
    for w, v in ((1, 4), (2, 1), (4, 2), (2, 2))
    if (a, w) != (b, v)
] + [Change(name, 1, 2, 3, 1) for name in method_cases.CASES]


def make_run(case: str, stage: int, world: int, root: str):
    from dataclasses import replace

    run = method_cases.run(case, batch=BATCH, steps=STEPS, zero=stage, **METHOD.get(case, {}))
    run.optim = replace(run.optim, **OPTIMIZERS.get(case, {}))
    run.data.views = tuple(replace(view, size=SMALL_CROPS.get(view.size, view.size)) for view in run.data.views)
    run.name, run.log.root = f"{case}_{stage}_{world}".replace(" ", "_"), root
    run.log.checkpoint_steps, run.log.every, run.log.probe, run.log.keep = SAVED, 1, True, 3
    return run


def contents(path: Path) -> dict:
    """Every tensor of a checkpoint, whole, and the probe; without the random states, which belong to ranks."""
    import safetensors.torch

    from fastssl.checkpoint import state
    from fastssl.checkpoint.pieces import Pieces

    values = state.read(path)
    pieces = Pieces(path / state.rank_file(rank) for rank in range(values["world"]))
    found = {name: pieces[name][:] for name in pieces if not name.startswith("random/")}
    found |= {f"probe/{name}": value for name, value in values["hooks"]["LinearProbe"].items()}
    return found | safetensors.torch.load_file(path / "weights.safetensors")


def save(case: str, stage: int, root: str) -> dict:
    """A run without a change: its losses and its state at SAVED and at the end."""
    from fastssl import dist, engine

    run = make_run(case, stage, dist.world(), root)
    t = engine.fit(run, device="cpu", loader=method_cases.loader(run))
    return result(t.folder)


def result(folder: Path) -> dict:
    import json

    records = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    losses = {r["step"]: (r["loss"], r["probe_loss"]) for r in records if "loss" in r}
    saved = {step: contents(folder / "checkpoints" / f"step_{step:08d}") for step in (SAVED, STEPS)}
    return {"losses": losses, "states": saved}


def change(c: Change, root: str) -> dict:
    """Continue the run from SAVED; the state that was loaded, as a new checkpoint gives it, and what follows."""
    from fastssl import dist, engine, hooks
    from fastssl.build import build
    from fastssl.checkpoint import state
    from fastssl.checkpoint.writer import Writer

    source = Path(root) / make_run(c.case, c.stage, c.world, root).name / "checkpoints" / f"step_{SAVED:08d}"
    run = make_run(c.case, c.new_stage, c.new_world, root)
    run.name, run.speed.channels_last = f"{source.parents[1].name}_to_{run.name}", c.new_stage != 2
    t = build(run, hooks.from_config(run), "cpu", method_cases.loader(run))
    state.load(t, source)
    with Writer(t) as writer:
        writer.save()
        again = writer.finish()
    found = {"loaded": contents(again)} if dist.is_main() else {}
    dist.barrier()
    t = engine.fit(run, device="cpu", resume_from=source, force=True, loader=method_cases.loader(run))
    dist.barrier()
    if not dist.is_main():
        return {}
    shutil.copytree(source, t.folder / "checkpoints" / source.name)
    return found | result(t.folder)


def worker(out: str, root: str, which: str) -> None:
    from fastssl import dist

    dist.init("cpu")
    torch.set_num_threads(1)
    changes, found = {"some": SOME, "all": ALL}[which.split()[0]], {}
    if "save" in which:
        for case, stage in dict.fromkeys((c.case, c.stage) for c in changes if c.world == dist.world()):
            found[case, stage, dist.world()] = save(case, stage, root)
    if "change" in which:
        for c in changes:
            if c.new_world == dist.world():
                found[str(c)] = change(c, root)
    if dist.is_main():
        torch.save(found, out)
    dist.shutdown()


def launch(folder: Path, which: str) -> dict:
    """Two ranks save; one saves and continues; two (and four) continue."""
    found, world = {}, {c.world for c in (SOME if which == "some" else ALL)}
    plan = [(w, "save") for w in sorted(world - {1})] + [(1, "save change")]
    plan += [(w, "change") for w in sorted(world - {1})]
    for w, what in plan:
        found |= ranks.launch(__file__, w, folder / "out.pt", str(folder), f"{which} {what}", timeout=3000)
    return found


@pytest.fixture(scope="module")
def some(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("some"), "some")


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("all"), "all")


@pytest.mark.parametrize("c", SOME, ids=str)
def test_a_run_continues_on_other_ranks_and_stages(some, c):
    compare(some, c)


@pytest.mark.full
@pytest.mark.timeout(6000)
@pytest.mark.parametrize("c", ALL, ids=str)
def test_every_change_of_ranks_and_stages_continues(everything, c):
    compare(everything, c)


def compare(results: dict, c: Change) -> None:
    whole, changed = results[c.case, c.stage, c.world], results[str(c)]
    saved, loaded = whole["states"][SAVED], changed["loaded"]
    assert loaded.keys() == saved.keys()
    assert any(key.startswith("optimizer/") for key in saved)
    for key, value in saved.items():
        pair = loaded[key], value
        if c.new_stage == 2 and key.startswith("optimizer/"):  # the elements have another order in memory
            pair = [flat.sort().values for flat in pair]
        assert torch.equal(*pair), key
    for step in range(SAVED + 1, STEPS + 1):
        torch.testing.assert_close(changed["losses"][step], whole["losses"][step], rtol=1e-5, atol=1e-5)
    for key, value in whole["states"][STEPS].items():
        if not key.startswith(("optimizer/", "probe/")):
            torch.testing.assert_close(
                changed["states"][STEPS][key], value, rtol=1e-4, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}"
            )


if __name__ == "__main__":
    ranks.main(worker)
