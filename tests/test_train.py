"""The command line: resuming after kill -9 within an epoch to the same bits, starting over, errors of one line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

CONFIG = """
from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run, Speed
from fastssl.methods import moco

def get_config():
    return Run(method=moco.Config(dims=(16,), queue=40, momentum=0.9),
               backbone=Backbone("resnet10", stem="cifar", width=8),
               data=Data(train={beton!r}, views=views.moco_v2(16)),
               optim=Optim(lr=0.1, batch=16, epochs=4, warmup_epochs=1, paramwise={{"bias": {{"weight_decay": 0.0}}}}),
               speed=Speed(micro_batch=4, workers=1), seed=1,
               log=Log(every=5, keep=2, checkpoint_epochs=0, checkpoint_steps=4, probe=False, tensorboard=False))
"""
ENV = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def start(folder: Path, *args: str, launcher=("-m", "deepspeed.launcher.runner", "--num_gpus", "2"), port=29511):
    train = str(Path(__file__).parents[1] / "fastssl" / "train.py")
    extra = ["--master_port", str(port)] if "deepspeed.launcher.runner" in launcher else []
    command = [sys.executable, *launcher, *extra, train, str(folder / "configs/moco/tiny.py"), "--deterministic", *args]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process) -> str:
    out, _ = process.communicate(timeout=500)
    assert process.returncode == 0, out[-5000:]
    return out


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "work_dirs/moco/tiny/log.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict:
    import safetensors.torch

    newest = sorted((folder / "work_dirs/moco/tiny/checkpoints").glob("step_*"))[-1]
    assert newest.name == "step_00000024"
    return safetensors.torch.load_file(newest / "weights.safetensors")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, beton):
    made = [tmp_path_factory.mktemp(name) for name in ("uninterrupted", "killed")]
    for folder in made:
        (folder / "configs/moco").mkdir(parents=True)
        (folder / "configs/moco/tiny.py").write_text(CONFIG.format(beton=str(beton)))
    return made


@pytest.fixture(scope="module")
def runs(folders):
    """One uninterrupted run by torchrun; one by deepspeed, killed within an epoch and resumed."""
    uninterrupted, killed = folders
    finish(start(uninterrupted, launcher=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")))
    process = start(killed)
    checkpoints = killed / "work_dirs/moco/tiny/checkpoints"
    deadline = time.time() + 300
    while not (checkpoints / "step_00000008" / "manifest.json").exists():  # 6 steps an epoch: in the second
        assert process.poll() is None, process.communicate()[0][-5000:]
        assert time.time() < deadline, "no checkpoint was written"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    subprocess.run(["pkill", "-9", "-f", str(killed)], check=False)  # the launcher puts ranks in groups of their own
    at_kill = sorted(p.name for p in checkpoints.glob("step_*") if p.suffix == "")
    out = finish(start(killed, "--resume", port=29512))
    return uninterrupted, killed, at_kill, out


def test_a_killed_run_continues_to_the_same_bits(runs):
    uninterrupted, killed, at_kill, out = runs
    assert "step_00000024" not in at_kill, "the run had finished before it was killed"
    assert f"continuing work_dirs/moco/tiny/checkpoints/{at_kill[-1]}" in out
    a, b = ({r["step"]: r["loss"] for r in records(folder) if "loss" in r} for folder in (uninterrupted, killed))
    assert sorted(a) == sorted(b) == list(range(1, 25)) and len(set(a.values())) == 24
    assert a == b
    ours, theirs = weights(killed), weights(uninterrupted)
    assert ours.keys() == theirs.keys() and "queue" in ours and "target.0.conv1.weight" in ours
    assert not [key for key in ours if not torch.equal(ours[key], theirs[key])]


def test_only_the_newest_checkpoints_are_kept(runs):
    for folder in runs[:2]:
        assert [p.name for p in sorted((folder / "work_dirs/moco/tiny/checkpoints").iterdir())] == [
            "step_00000020",
            "step_00000024",
        ]


@pytest.mark.parametrize(
    "args, message",
    [
        ((), "already holds step_00000024: continue it with --resume"),
        (("--resume", "optim.lr=0.2"), "optim.lr was 0.1 when step_00000024 was written and is 0.2 now"),
        (
            ("--resume", "name=other"),
            "cannot resume: no complete checkpoint in work_dirs/other/checkpoints; start without --resume",
        ),
        (("optim.lrr=0.2",), "did you mean 'lr'"),
        (("name=other", "optim.batch=15"), "speed.micro_batch=4 does not divide a rank's part, 15"),
        (("name=other", "data.train=no.beton"), "no.beton"),
        (("name=other", "backbone.in_channels=1"), "backbone.in_channels=1: views have 3 channels"),
        (("name=other", "backbone.name=resnet19"), "did you mean 'resnet1"),
        (("name=other", "method.queue=8"), "method.queue=8 is smaller than optim.batch=16"),
    ],
)
def test_mistakes_end_in_one_line_and_code_2(runs, monkeypatch, capsys, args, message):
    from fastssl import train

    monkeypatch.chdir(runs[0])
    before = sorted(p.name for p in runs[0].rglob("*"))
    assert train.main(["configs/moco/tiny.py", "--device", "cpu", *args]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1, err
    assert sorted(p.name for p in runs[0].rglob("*")) == before, "a failed start left files behind"
