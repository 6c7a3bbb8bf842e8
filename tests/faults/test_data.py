"""The training file is replaced, cut short or gone in the middle of a run; another one lies there on resume."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastssl import train
from fastssl.checkpoint import disk

CONFIG = """
import os
from pathlib import Path
from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run, Speed
from fastssl.hooks import Hook
from fastssl.methods import simclr

class Act(Hook):
    def after_step(self, t, out, batch):
        what, data = os.environ.get("ACT"), Path("disk/a.beton")
        if t.step == 3 and what == "replace":
            os.replace("other.beton", data)
        if t.step == 3 and what == "gone":
            os.rename("disk", "elsewhere")
        if t.step == 3 and what == "cut":
            os.truncate(data, 5000)

def get_config():
    return Run(method=simclr.Config(dims=(32, 16)), backbone=Backbone("resnet10", stem="cifar", width=8),
               data=Data(train="disk/a.beton", views=views.simclr(16)), hooks=(Act(),), name="r",
               optim=Optim(lr=0.05, batch=16, epochs=2, schedule="constant"), speed=Speed(workers=1),
               log=Log(every=1, checkpoint_steps=2, collapse_every=0, tensorboard=False))
"""


@pytest.fixture
def start(tmp_path, beton, monkeypatch, capfd):
    """start(action, *args) -> (exit code, lines)."""
    monkeypatch.chdir(tmp_path)
    Path("c.py").write_text(CONFIG)
    Path("disk").mkdir()
    shutil.copy(beton, "disk/a.beton")

    def run(action, *args):
        monkeypatch.setenv("ACT", action)
        capfd.readouterr()
        code = train.main(["c.py", "--device", "cpu", *args])
        return code, "".join(capfd.readouterr()).splitlines()

    return run


def losses(name: str) -> list[float]:
    return [json.loads(line)["loss"] for line in Path("work_dirs", name, "log.jsonl").read_text().splitlines()]


def test_a_file_that_changes_or_goes_ends_the_run_and_nothing_beyond_the_last_checkpoint_is_lost(start, beton, photos):
    from conftest import write_beton

    assert start("", "name=whole")[0] == 0

    write_beton("other.beton", photos[::-1])
    shutil.copy("other.beton", "kept.beton")
    code, lines = start("replace", "name=replaced")
    assert code == 2 and lines[-1].startswith("fastssl: disk/a.beton was changed or replaced while it was read: ")
    code, lines = start("", "name=replaced", "--resume")
    assert code == 2 and "--resume: data.train=disk/a.beton is another file than before (103 images, " in lines[-1]
    shutil.copy(beton, "disk/a.beton")
    assert start("", "name=replaced", "--resume")[0] == 0

    code, lines = start("gone", "name=gone")
    assert code == 2
    assert lines[-1].startswith("fastssl: disk/a.beton cannot be read any more (No such file or directory): ")
    os.rename("elsewhere", "disk")
    assert start("", "name=gone", "--resume")[0] == 0
    assert losses("whole") == losses("replaced") == losses("gone") and len(losses("whole")) == 12


def test_a_file_that_is_cut_short_ends_the_run(start):
    """With one line, or by SIGBUS where an image was being read; then Python's stack names the reading function."""
    command = [sys.executable, train.__file__, "c.py", "--device", "cpu"]
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")  # which dist.init has set in this process
    env = {k: v for k, v in os.environ.items() if k not in ranks} | {"ACT": "cut"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode == -signal.SIGBUS:
        assert "Fatal Python error: Bus error" in done.stderr and "in decode" in done.stderr
    else:
        assert done.returncode == 2 and "disk/a.beton was changed or replaced while it was read" in done.stderr
    assert disk.newest("work_dirs/r").name in ("step_00000002", "step_00000004")  # two batches were decoded ahead


def test_the_log_of_a_run_without_a_checkpoint_is_kept(start):
    code, _ = start("gone", "log.checkpoint_steps=12")
    assert code == 2 and not list(Path("work_dirs/r").glob("checkpoints/step_*"))
    before = Path("work_dirs/r/log.jsonl").read_text()
    os.rename("elsewhere", "disk")
    code, lines = start("", "optim.steps=1")
    assert code == 0 and "work_dirs/r: the log of a run that has left no checkpoint is kept as log-1.jsonl" in lines
    assert Path("work_dirs/r/log-1.jsonl").read_text() == before and len(losses("r")) == 1
    code, lines = start("", "--continue", "optim.steps=2")
    assert code == 0 and any(line.startswith("continuing work_dirs/r/checkpoints/step_00000001") for line in lines)
    code, lines = start("", "--continue", "--resume")
    assert code == 2 and lines[-1] == "fastssl: --resume and --continue: give one of them"
