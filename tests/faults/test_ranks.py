"""How a run on two ranks ends early: a signal or an error on one rank, a rank that is killed or hangs, a launcher that
was killed; and restarts in place."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIG = """
import os, signal, time
from pathlib import Path
import torch
from fastssl import ending, views
from fastssl.config import Backbone, Data, Log, Optim, Run, Speed
from fastssl.hooks import Hook
from fastssl.methods import simclr

class Act(Hook):
    def after_step(self, t, out, batch):
        mode, rank = os.environ["MODE"], int(os.environ["RANK"])
        if mode == "signal" and rank == 1 and t.step == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        if mode == "error" and rank == 1 and t.step == 5:
            raise ValueError("image 100 is damaged")
        if mode == "memory" and rank == 1 and t.step == 4:
            t.method.forward = self.forward
        life = mode + os.environ.get("FASTSSL_RESTARTS", "")
        if life == "restarts0" and rank == 1 and t.step == 5:
            while not Path("work_dirs/restarts/checkpoints/step_00000004").exists():
                time.sleep(0.01)  # it is written in the background
            os.kill(os.getpid(), signal.SIGKILL)
        if life == "restarts1" and t.step == 7:
            ending.progress.limit = 3.0
            if rank == 1:
                time.sleep(1000)
        if mode == "gone" and t.step == 2:
            Path(f"pid{{rank}}.new").write_text(f"{{os.getpid()}} {{os.getppid()}}")
            Path(f"pid{{rank}}.new").rename(f"pid{{rank}}")

    def forward(self, views, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

def get_config():
    return Run(method=simclr.Config(dims=(32, 16)), backbone=Backbone("resnet10", stem="cifar", width=8),
               data=Data(train={beton!r}, views=views.simclr(16)), hooks=(Act(),), name="r",
               optim=Optim(lr=0.05, batch=16, epochs=9999, schedule="constant"), speed=Speed(workers=1),
               log=Log(every=1, checkpoint_epochs=0, collapse_every=0, tensorboard=False))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, beton):
    folder = tmp_path_factory.mktemp("ends")
    (folder / "c.py").write_text(CONFIG.format(beton=str(beton)))
    return folder


def srun(folder: Path, mode: str, *args: str, seconds: int = 300) -> tuple[list[int], list[str]]:
    """Start two ranks like Slurm's srun; returns their exit codes and the lines of both."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}  # of dist.init
    env = {
        **env,
        "MODE": mode,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NODEID": "0",
    }
    command = [sys.executable, str(ROOT / "fastssl/train.py"), "c.py", *args]
    with open(folder / f"{mode}.log", "w") as out:
        both = [
            subprocess.Popen(
                command,
                cwd=folder,
                stdout=out,
                stderr=out,
                env=env | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            )
            for rank in (0, 1)
        ]
        try:
            codes = [process.wait(seconds) for process in both]
        finally:
            for process in both:
                process.kill()
    return codes, (folder / f"{mode}.log").read_text().splitlines()


@pytest.fixture(scope="module")
def stopped(folder):
    return srun(folder, "signal")


def test_srun_joins_the_ranks_and_a_signal_to_one_ends_both_with_a_checkpoint(folder, stopped):
    codes, lines = stopped
    assert codes == [75, 75], lines
    assert any("; 2 ranks on CPU" in line for line in lines)
    assert sum(line.startswith("stopped by SIGUSR1 at step 3 of 59994; checkpoint ") for line in lines) == 1
    assert [p.name for p in (folder / "work_dirs/r/checkpoints").iterdir()] == ["step_00000003"]


def test_an_error_on_one_rank_is_the_last_line_and_ends_the_other(folder, stopped):
    codes, lines = srun(folder, "error", "--resume")
    assert codes == [2, 2], lines
    assert any(line.startswith("step 4/") for line in lines)
    assert lines[-1] == f"fastssl: image 100 is damaged (rank 1 on {socket.gethostname()})"
    assert not [line for line in lines if "Traceback" in line]


def test_a_lack_of_memory_on_one_rank_ends_both_with_one_message(folder, stopped):
    codes, lines = srun(folder, "memory", "--resume")
    assert codes == [2, 2], lines
    message = "fastssl: out of memory after step 4: set speed.micro_batch=4 (now 8), which is the next smaller one: "
    assert lines[-1].startswith(message)
    assert lines[-1].endswith(f"CUDA out of memory. Tried to allocate 2.00 GiB.) (rank 1 on {socket.gethostname()})")
    assert sum("out of memory" in line for line in lines) == 1 and not [line for line in lines if "Traceback" in line]


@pytest.fixture(scope="module")
def restarted(folder):
    """In the first life rank 1 is killed after step 4, in the second it hangs after step 7, the third ends the run."""
    args = ("optim.epochs=2", "log.checkpoint_steps=2")
    lives = srun(folder, "restarts", "name=restarts", "--restarts", "2", *args, seconds=550)
    return lives, srun(folder, "none", "name=none", *args)


def test_a_killed_rank_is_named_and_the_run_is_restarted_in_place(folder, restarted):
    (codes, lines), _ = restarted
    assert codes == [0, 0], lines
    host = socket.gethostname()
    killed = [line for line in lines if line.startswith(f"fastssl: rank 1 is lost on {host} after step ")]
    assert len(killed) == 1 and "it was killed" in killed[0] and killed[0].endswith("; continue with --resume")
    assert "fastssl: rank 1 was ended by SIGKILL; restart 1 of 2" in lines
    assert "continuing work_dirs/restarts/checkpoints/step_00000004" in lines
    assert not [line for line in lines if "Traceback" in line]


def test_a_rank_that_hangs_is_named_with_the_place_where_it_waits(restarted):
    (_, lines), _ = restarted
    (late,) = [line for line in lines if "timeout_s" in line]
    assert late.startswith(
        f"fastssl: no step in 3 s (timeout_s): rank 1 on {socket.gethostname()} hangs after step 6 in c.py:"
    )
    assert "(after_step); rank 0 waits for it in " in late
    assert "fastssl: rank 0 ended with exit code 1; restart 2 of 2" in lines
    assert "continuing work_dirs/restarts/checkpoints/step_00000006" in lines


def test_a_restarted_run_gives_the_same_bits(folder, restarted):
    _, (codes, lines) = restarted
    assert codes == [0, 0], lines
    found = []
    for name in ("restarts", "none"):
        records = map(json.loads, (folder / f"work_dirs/{name}/log.jsonl").read_text().splitlines())
        found.append([(r["step"], r["loss"]) for r in records if "loss" in r])
    assert found[0] == found[1] and len(found[0]) == 12


def test_ranks_agree_on_a_loss_that_is_not_finite(folder, monkeypatch, capsys):
    """Both end after the same step and find the first tensor together; one rank replays the batch of both."""
    from fastssl import dist, replay

    settings = ("name=nan", "optim.lr=1e30")
    codes, lines = srun(folder, "nan", *settings)
    assert codes == [2, 2], lines
    assert "the first tensor that is not finite, in step " in lines[-1] and "(rank " in lines[-1]
    saved = folder / "work_dirs/nan/nonfinite"
    assert sorted(p.name for p in saved.iterdir()) == ["batch_rank_0.pt", "batch_rank_1.pt", "checkpoints"]
    dist.shutdown()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MODE", "replay")
    assert replay.main(["c.py", *settings, "--device", "cpu"]) == 0
    assert "the first tensor that is not finite, in step " in capsys.readouterr().out


def test_ranks_end_with_their_launcher(folder):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    env = {**os.environ, "MODE": "gone", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--num_gpus",
        "2",
        "--master_port",
        port,
        str(ROOT / "fastssl/train.py"),
        "c.py",
        "name=gone",
    ]
    with open(folder / "gone.log", "w") as out:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=out, stderr=out, start_new_session=True)
    try:
        wait_for(lambda: (folder / "pid0").exists() and (folder / "pid1").exists(), folder)
        ranks, launchers = zip(*(map(int, (folder / f"pid{r}").read_text().split()) for r in (0, 1)))
        os.kill(launchers[0], signal.SIGKILL)
        wait_for(lambda: not any(alive(pid) for pid in ranks), folder)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert len(list((folder / "work_dirs/gone/checkpoints").glob("step_*/manifest.json"))) == 1


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, folder: Path) -> None:
    deadline = time.time() + 240
    while not condition():
        assert time.time() < deadline, (folder / "gone.log").read_text()[-3000:]
        time.sleep(0.1)
