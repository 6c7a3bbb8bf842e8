"""A run's folder, what may change on resume, and how a run ends early (docs/runs.md), in one process."""

import json
import os
import resource
import signal
import socket
from pathlib import Path

import pytest
import torch

CONFIG = """
import os, signal
from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run, Speed
from fastssl.hooks import Hook
from fastssl.methods import simclr

class Send(Hook):
    def after_step(self, t, out, batch):
        if t.step == 3 and "SEND" in os.environ:
            os.kill(os.getpid(), int(os.environ["SEND"]))

def get_config():
    return Run(method=simclr.Config(dims=(32, 16)), backbone=Backbone("resnet10", stem="cifar", width=8),
               data=Data(train={beton!r}, views=views.simclr(16)), hooks=(Send(),), name="r",
               optim=Optim(lr=0.05, batch=16, epochs=1, schedule="constant"), speed=Speed(workers=1),
               log=Log(every=100, checkpoint_steps=2, collapse_every=0, tensorboard=False))
"""


@pytest.fixture
def train(tmp_path, beton, monkeypatch, capfd):
    """train(*args) -> (exit code, lines of the output); `fastssl train` in this process."""
    from fastssl import train

    monkeypatch.chdir(tmp_path)
    Path("c.py").write_text(CONFIG.format(beton=str(beton)))

    def run(*args):
        capfd.readouterr()
        code = train.main(["c.py", "--device", "cpu", *args])
        return code, "".join(capfd.readouterr()).splitlines()

    return run


def checkpoints(name="r") -> list[int]:
    return sorted(int(p.name[5:]) for p in Path("work_dirs", name, "checkpoints").glob("step_*"))


def losses(name="r") -> list[float]:
    records = map(json.loads, Path("work_dirs", name, "log.jsonl").read_text().splitlines())
    return [r["loss"] for r in records if "loss" in r]


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_with_a_checkpoint_that_can_be_resumed(train, monkeypatch, number, code):
    before = signal.getsignal(number)
    monkeypatch.setenv("SEND", str(int(number)))
    got, lines = train()
    assert got == code
    assert (
        f"stopped by {number.name} at step 3 of 6; checkpoint work_dirs/r/checkpoints/step_00000003; "
        "continue with --resume"
    ) in lines
    assert checkpoints() == [2, 3] and len(losses()) == 3 and signal.getsignal(number) is before
    assert json.loads(Path("work_dirs/r/environment.json").read_text())[-1]["config"] == str(Path("c.py").resolve())
    monkeypatch.delenv("SEND")
    assert train("--resume")[0] == 0
    assert checkpoints()[-1] == 6 and len(losses()) == 6


def test_a_signal_at_the_end_of_an_epoch_loses_no_evaluation(train, monkeypatch):
    """The step of the signal is the last of the first of two epochs: the hooks are called before the checkpoint."""
    Path("c.py").write_text(
        Path("c.py").read_text()
        + """
class Count(Hook):
    count = 0

    def after_epoch(self, t):
        self.count += 1
        t.log({"counted": self.count})

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]

Send.after_step = lambda self, t, out, batch: (
    os.kill(os.getpid(), int(os.environ["SEND"])) if t.step == t.loader.steps and "SEND" in os.environ else None)
one = get_config

def get_config():
    run = one()
    run.hooks, run.optim.epochs, run.log.checkpoint_steps = (*run.hooks, Count()), 2, 100
    return run
"""
    )
    monkeypatch.setenv("SEND", str(int(signal.SIGTERM)))
    assert train()[0] == 75
    monkeypatch.delenv("SEND")
    assert train("--resume")[0] == 0
    records = [json.loads(line) for line in Path("work_dirs/r/log.jsonl").read_text().splitlines()]
    assert [(r["step"], r["counted"]) for r in records if "counted" in r] == [(6, 1), (12, 2)]


def test_the_first_lines_describe_the_run_and_the_last_the_next_command(train):
    code, lines = train("log.keep_every=0.5", "log.keep=1")
    assert code == 0
    assert (
        "SimCLR, resnet10: 103 images, 6 steps of 16 images (1 epochs); 1 rank on CPU, fp32; run folder work_dirs/r"
    ) in lines
    assert any(line.startswith("step 1/6  epoch 0  loss ") for line in lines)
    assert "done: work_dirs/r; next: fastssl report work_dirs/r" in lines
    assert checkpoints() == [3, 6]


def test_a_folder_in_use_or_with_checkpoints_is_refused(train):
    from fastssl.checkpoint import run_folder

    with run_folder.lock("work_dirs/r", "b/c.py"):
        code, lines = train()
    assert code == 2 and f"is being trained by another process (process {os.getpid()} on " in lines[-1]
    assert f", {Path('b/c.py').resolve()}): wait for its end" in lines[-1]
    assert train()[0] == 0
    for path in Path("work_dirs/r/checkpoints").glob("*/state.pt"):
        path.write_bytes(b"damaged")
    code, lines = train()
    assert code == 2 and "work_dirs/r holds damaged checkpoints only" in lines[-1]
    assert all(word in lines[-1] for word in ("--resume", "name=", "--force"))
    code, lines = train("--resume")
    assert code == 2 and "no complete checkpoint" in lines[-1] and "--force" in lines[-1]
    assert train("--force", "optim.steps=1")[0] == 0
    assert checkpoints() == [1] and len(losses()) == 1


def test_log_and_speed_settings_and_the_length_may_change_on_resume(train):
    assert train("name=long", "optim.epochs=2")[0] == 0
    assert train()[0] == 0
    code, lines = train("--resume", "optim.schedule=cosine", "optim.epochs=2")
    assert code == 2 and "optim.epochs was 1" in lines[-1] and "backbone.pretrained" in lines[-1]
    changed = (
        "optim.epochs=2",
        "speed.zero=1",
        "speed.channels_last=False",
        "speed.workers=2",
        "log.collapse_every=2",
        "log.every=1",
    )
    code, lines = train("--resume", *changed)
    assert code == 0
    assert any(line.startswith("the run ends after step 12 instead of 6; ") for line in lines)
    assert any("was written by 1 rank(s) at ZeRO 0; now 1 at ZeRO 1: the same state" in line for line in lines)
    torch.testing.assert_close(losses(), losses("long"), rtol=0, atol=2e-5)
    code, lines = train("--resume", *changed[1:])
    assert code == 2 and "step_00000012 is at step 12" in lines[-1] and "can be lengthened only" in lines[-1]
    code, lines = train("--resume-from", "work_dirs/long/checkpoints/step_00000010", "optim.epochs=2")
    assert code == 2 and "which does not lead to" in lines[-1]
    assert train("name=branch", "--resume-from", "work_dirs/long/checkpoints/step_00000010", "optim.epochs=2")[0] == 0
    assert losses("branch") == losses("long")[10:]
    code, lines = train("name=other", "--resume-from", "work_dirs/long")
    assert code == 2 and "not a complete checkpoint" in lines[-1]


class Count:
    def __init__(self):
        self.steps = 0

    def before_epoch(self, t):
        pass

    after_epoch = before_epoch

    def after_step(self, t, out, batch):
        self.steps += 1

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, values):
        self.steps = values["steps"]


class Another(Count):
    pass


def test_hooks_are_found_by_their_class_on_resume(train, monkeypatch):
    from fastssl import hooks

    first, second, later = [Count(), Another()], [Another(), Count(), Count()], [Another()]
    for given in (first, second, later):
        monkeypatch.setattr(hooks, "from_config", lambda run, given=given: given)
        code, lines = train(*() if given is first else ("--resume",), f"optim.steps={2 + 2 * (given is not first)}")
        assert code == 0, lines
    assert [h.steps for h in second] == [4, 4, 2] and later[0].steps == 4
    assert any("hooks of step_00000004 that are no longer there: Count, Count#1" in line for line in lines)


def test_no_checkpoint_is_written_of_weights_that_are_not_finite(train):
    code, lines = train("name=end", "optim.lr=1e12", "optim.steps=2", "log.checkpoint_steps=1")
    assert code == 2 and "no checkpoint of step 2 is written" in lines[-1], lines
    assert checkpoints("end") == [1]


def test_a_weight_that_is_not_finite_is_detected():
    from fastssl.zero import all_finite

    layer = torch.nn.Linear(3, 2)
    assert all_finite(layer)
    layer.bias.data[1] = float("inf")
    assert not all_finite(layer)


def test_the_error_names_a_full_disk(train):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
        code, lines = train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2, lines
    assert lines[-1] == "fastssl: work_dirs/r/checkpoints: File too large; the newest complete checkpoint is none"


def test_the_error_names_a_root_that_cannot_be_created(train):
    Path("file").write_text("")
    code, lines = train("log.root=file")
    assert code == 2 and lines[-1].startswith("fastssl: file/r: ")


def test_precision_that_the_cpu_lacks_is_replaced_with_a_message(train, monkeypatch):
    from fastssl import amp

    monkeypatch.setattr(amp, "NATIVE", {"bf16": {"none"}, "fp16": {"none"}})
    code, lines = train("optim.precision=bf16", "optim.steps=1")
    assert code == 0 and any("training in fp32" in line for line in lines)
    assert json.loads(Path("work_dirs/r/config.json").read_text())["optim"]["precision"] == "fp32"


def test_the_error_names_a_port_in_use(monkeypatch):
    from fastssl import dist

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=f"port 127.0.0.1:{port} is in use .* --master_port N"):
            dist.init("cpu")


@pytest.mark.parametrize(
    "nodes, first",
    [("gpu[07-09,12],x", "gpu07"), ("a1", "a1"), ("a1,a2", "a1"), ("r[1-2]n[03,04]", "r1n03"), ("n[5]-ib,m", "n5-ib")],
)
def test_srun_is_a_launcher(monkeypatch, nodes, first):
    from fastssl import launcher

    step = {
        "SLURM_PROCID": "5",
        "SLURM_STEP_NUM_TASKS": "7",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "4,3",
        "SLURM_STEP_NODELIST": nodes,
        "SLURM_JOB_ID": "123456",
        "SLURM_STEP_ID": "2",
    }
    monkeypatch.setattr(os, "environ", dict(step))
    launcher.set_variables()
    wanted = {"RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": first}
    assert {name: os.environ[name] for name in wanted} == wanted and 15000 <= int(os.environ["MASTER_PORT"]) < 30000
    for other in ({"RANK": "0"}, {"SLURM_STEP_NUM_TASKS": "1"}):  # torchrun in a job step; one task
        monkeypatch.setattr(os, "environ", step | other)
        launcher.set_variables()
        assert "WORLD_SIZE" not in os.environ
