"""Checkpoints are written while training goes on: of the step at which they were due, and what waits for them."""

import errno
import os
import sys
import threading
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "methods"))
import method_cases as cases

from fastssl import dist, engine
from fastssl.checkpoint import disk
from fastssl.hooks import Hook

STEPS = 8


class At(Hook):
    """Calls a function after a step."""

    def __init__(self, step, function):
        self.step, self.function = step, function

    def after_step(self, t, out, batch):
        if t.step == self.step:
            self.function()


@pytest.fixture
def train(tmp_path):
    """train(name, hooks): a run with a checkpoint at every fourth step; its folder of checkpoints."""
    dist.init("cpu")

    def fit(name, *hooks, every=4, keep=-1):
        run = cases.run("moco", steps=STEPS)
        run.name, run.log.root, run.log.checkpoint_steps, run.log.keep = name, str(tmp_path), every, keep
        engine.fit(run, hooks=list(hooks), device="cpu", loader=cases.loader(run))
        return tmp_path / name / "checkpoints"

    yield fit
    dist.shutdown()


@pytest.fixture
def slow(monkeypatch):
    """slow(action): calls action(path) in the thread before a file of a checkpoint is written."""
    write = disk.write

    def use(action):
        def later(path, content):
            action(path)
            return write(path, content)

        monkeypatch.setattr(disk, "write", later)

    return use


def tensors(path):
    return {k: v for f in sorted(path.glob("*.safetensors")) for k, v in safetensors.torch.load_file(f).items()}


def test_training_continues_while_a_checkpoint_is_written(train, slow):
    plain, reached, late = train("plain"), threading.Event(), []
    slow(lambda path: late.append(path) if "0004" in path.parent.name and not reached.wait(60) else None)
    found = train("slow", At(7, reached.set))
    assert not late, "step 7 was not made before the checkpoint of step 4 was written"
    for step in ("step_00000004", "step_00000008"):
        assert disk.damage(found / step) is None
        a, b = tensors(found / step), tensors(plain / step)
        assert a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def test_a_checkpoint_waits_for_the_one_before(train, slow):
    folders = []

    def action(path):
        time.sleep(0.05)
        folders.append(sorted(p.name for p in path.parents[1].glob("*.tmp")))

    slow(action)
    found = train("often", every=1, keep=3)
    assert all(len(names) == 1 for names in folders) and len(folders) == 3 * STEPS  # three files each
    assert sorted(p.name for p in found.iterdir()) == [f"step_{n:08d}" for n in (6, 7, 8)]
    assert disk.newest(found.parent) == found / "step_00000008"


def test_a_disk_that_is_full_ends_the_run_and_the_former_checkpoint_stays(train, slow, tmp_path):
    made = []

    def full(path):
        if "0004" in path.parent.name and path.name.startswith("rank"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    slow(full)
    wait = At(5, lambda: time.sleep(1))
    with pytest.raises(ValueError, match="No space left on device; the newest complete checkpoint is step_00000002"):
        train("full", wait, *(At(n, lambda n=n: made.append(n)) for n in range(1, STEPS + 1)), every=2)
    folder = tmp_path / "full" / "checkpoints"
    assert [p.name for p in folder.iterdir()] == ["step_00000002"] and disk.damage(folder / "step_00000002") is None
    assert made[-1] < STEPS, "the error came at the end of the run"


def test_an_error_in_training_waits_for_the_checkpoint(train, slow, tmp_path):
    slow(lambda path: time.sleep(0.5))

    def fail():
        raise RuntimeError("a hook fails")

    with pytest.raises(RuntimeError, match="a hook fails"):
        train("error", At(5, fail))
    assert disk.newest(tmp_path / "error").name == "step_00000004"
