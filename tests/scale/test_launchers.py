"""Two hosts with one rank each give the losses and the weights of one host with two ranks, by every launcher."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import hosts as network
import pytest
import safetensors.torch
import slurm_cluster
import torch

TRAIN = str(Path(__file__).parents[2] / "fastssl" / "train.py")
DEEPSPEED = (sys.executable, "-m", "deepspeed.launcher.runner")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
STEPS = 12
CONFIG = """
import os, select, signal, time
from pathlib import Path
from fastssl import views
from fastssl.ending import watchdog
from fastssl.config import Backbone, Data, Log, Optim, Run, Speed
from fastssl.hooks import Hook
from fastssl.methods import moco

class Hold(Hook):
    '''The first start of a job with HOLD in its environment waits after step 5 for a signal, and that of a run
    cut... is slow from there on, until its network is cut.'''

    def after_step(self, t, out, batch):
        if "HOLD" in os.environ and "SLURM_RESTART_COUNT" not in os.environ and t.step == 5:
            received, sent = os.pipe()
            os.set_blocking(sent, False)
            signal.set_wakeup_fd(sent)
            Path(os.environ["HOLD"]).touch()
            select.select([received], [], [], 400)
        if t.run.name.startswith("cut") and os.environ.get("FASTSSL_RESTARTS", "0") == "0" and t.step >= 5:
            watchdog.SILENT_S = float(os.environ.get("SILENT_S", watchdog.SILENT_S))
            Path(f"{{t.run.name}}-{{os.environ['RANK']}}").touch()
            time.sleep(3)

def get_config():
    return Run(method=moco.Config(dims=(16,), queue=40, momentum=0.9), seed=1, deterministic=True,
               backbone=Backbone("resnet10", stem="cifar", width=8),
               data=Data(train={beton!r}, views=views.moco_v2(16)), hooks=(Hold(),),
               optim=Optim(lr=0.1, batch=16, epochs=2), speed=Speed(workers=1),
               log=Log(every=1, checkpoint_epochs=0, checkpoint_steps=1, probe=False, tensorboard=False))
"""


@pytest.fixture(scope="module")
def network_of_two(tmp_path_factory):
    network.need_namespaces()
    made = network.Hosts(tmp_path_factory.mktemp("hosts"))
    with made:
        yield made


@pytest.fixture(scope="module")
def hosts(network_of_two):
    """node1 and node2, which reach each other by ssh."""
    network.need_programs("sshd", "ssh", "pdsh")
    network_of_two.start_sshd()
    return network_of_two.hosts


@pytest.fixture(scope="module")
def slurm(network_of_two, tmp_path_factory):
    """Slurm on node1 and node2."""
    network.need_programs(*slurm_cluster.PROGRAMS)
    return slurm_cluster.Slurm(network_of_two.hosts, tmp_path_factory.mktemp("slurm"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, beton):
    folder = tmp_path_factory.mktemp("launches")
    (folder / "c.py").write_text(CONFIG.format(beton=str(beton)))
    (folder / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    (folder / ".deepspeed_env").write_text("".join(f"{k}={v}\n" for k, v in network.ENV.items()))
    return folder


@pytest.fixture(scope="module")
def one_node(folder):
    """The run on one node with two ranks."""
    launch(folder, [*TORCHRUN, "--standalone", "--nproc_per_node", "2", TRAIN, "c.py", "name=one"])
    return result(folder, "one")


def launch(folder: Path, *commands: list[str], **variables: str) -> list[str]:
    """Start the commands at the same time; what each has printed.  All must end with exit code 0."""
    env = network.environment() | variables
    out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [subprocess.Popen(command, cwd=folder, env=env, **out) for command in commands]
    try:
        printed = [process.communicate(timeout=400)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * len(commands), "\n".join(
        text[-4000:] for text in printed
    )
    return printed


def result(folder: Path, name: str) -> tuple[dict[int, float], dict[str, torch.Tensor]]:
    """(loss of each step, final weights) of a run."""
    run = folder / "work_dirs" / name
    losses = {
        r["step"]: r["loss"] for r in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if "loss" in r
    }
    return losses, safetensors.torch.load_file(run / f"checkpoints/step_{STEPS:08}/weights.safetensors")


def assert_equal(one, other) -> None:
    """Two runs have the same losses and final weights, to the bit."""
    (losses, weights), (other_losses, other_weights) = one, other
    assert losses == other_losses and sorted(losses) == list(range(1, STEPS + 1))
    assert weights.keys() == other_weights.keys() and "queue" in weights
    assert not [key for key in weights if not torch.equal(weights[key], other_weights[key])]


def test_deepspeed_with_a_hostfile(hosts, folder, one_node):
    first, _ = hosts
    (printed,) = launch(folder, first.command(*DEEPSPEED, "--hostfile", "hosts", TRAIN, "c.py", "name=pdsh"))
    assert "node1: MoCo, resnet10: 103 images" in printed and "; 2 ranks on CPU" in printed
    assert_equal(result(folder, "pdsh"), one_node)


@pytest.mark.full
def test_deepspeed_with_open_mpi(hosts, folder, one_node):
    network.need_programs("mpirun")
    mpirun = "--allow-run-as-root -x MASTER_ADDR=node1 -x MASTER_PORT=29507"
    options = ["--hostfile", "hosts", "--launcher", "openmpi", "--launcher_args", mpirun]
    launch(folder, hosts[0].command(*DEEPSPEED, *options, TRAIN, "c.py", "name=openmpi"))
    assert_equal(result(folder, "openmpi"), one_node)


@pytest.mark.full
def test_torchrun_with_two_agents(hosts, folder, one_node):
    options = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_endpoint", "node1:29500"]
    launch(folder, *(host.command(*TORCHRUN, *options, TRAIN, "c.py", "name=torchrun") for host in hosts))
    assert_equal(result(folder, "torchrun"), one_node)


@pytest.mark.full
def test_two_jobs_at_once_on_both_hosts(hosts, folder, one_node):
    command = (*DEEPSPEED, "--hostfile", "hosts", "--master_port")
    names = {"a": "29501", "b": "29502"}
    launch(folder, *(hosts[0].command(*command, port, TRAIN, "c.py", f"name={n}") for n, port in names.items()))
    for name in names:
        assert_equal(result(folder, name), one_node)


@pytest.mark.full
def test_a_port_in_use_ends_the_job_on_both_hosts(hosts, folder):
    """Rank 0 cannot listen, and rank 1 on the other host finds the rank 1 of another job."""
    first, _ = hosts
    listen = """if True:
        import time, torch.distributed as td
        store = td.TCPStore("node1", 29503, 2, True, wait_for_workers=False)
        store.set("fastssl/rank/1", "process 1 on node9")
        print("ready", flush=True)
        time.sleep(300)"""
    other = first.popen(sys.executable, "-c", listen, cwd=folder)
    try:
        assert "ready\n" in iter(other.stdout.readline, "")
        command = [*DEEPSPEED, "--hostfile", "hosts", "--master_port", "29503", TRAIN, "c.py", "name=taken"]
        done = subprocess.run(
            first.command(*command), cwd=folder, env=network.environment(), capture_output=True, text=True, timeout=200
        )
    finally:
        other.kill()
        other.communicate()
    assert done.returncode != 0
    printed = done.stdout + done.stderr
    assert f"fastssl: port {first.address}:29503 is in use by another job on this machine" in printed
    assert (
        f"fastssl: port {first.address}:29503 is in use by another job, whose rank 1 is process 1 on node9" in printed
    )
    assert not (folder / "work_dirs/taken").exists()


def wait_until(condition, seconds: float, started: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and all(process.poll() is None for process in started)
        time.sleep(0.1)


def test_a_host_that_vanishes_ends_both_ranks_which_continue_when_it_is_back(network_of_two, folder, one_node):
    """Its network is cut: nothing that is sent arrives, and no connection is closed."""
    hosts, logs = network_of_two.hosts, [folder / f"cut{rank}.log" for rank in (0, 1)]
    env = network.environment() | {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "29509", "SILENT_S": "8"}
    command = [sys.executable, TRAIN, "c.py", "name=cut", "--restarts", "1"]
    started = []
    try:
        for rank, (host, log) in enumerate(zip(hosts, logs)):
            variables = env | {"RANK": str(rank), "MASTER_ADDR": hosts[0].address}
            with log.open("w") as out:
                started.append(
                    subprocess.Popen(host.command(*command), cwd=folder, env=variables, stdout=out, stderr=out)
                )
        wait_until(lambda: all((folder / f"cut-{rank}").exists() for rank in (0, 1)), 300, started)
        hosts[1].set_link("down")
        wait_until(lambda: all("is lost" in log.read_text() for log in logs), 60, started)
        hosts[1].set_link("up")
        assert [process.wait(300) for process in started] == [0, 0], "".join(log.read_text() for log in logs)
    finally:
        hosts[1].set_link("up")
        for process in started:
            process.kill()
    first, second = (log.read_text() for log in logs)
    assert re.search(r"^fastssl: rank 1 is lost on node2 after step \d: no heartbeat for 8 s; ", first, re.M)
    how = "the store of the ranks, which it hosts, has not answered for 8 s; "
    assert re.search(rf"^fastssl: rank 0 is lost on node1 after step \d: {how}", second, re.M)
    assert re.search("^continuing work_dirs/cut/checkpoints/step_0000000[4-6]$", first, re.M)
    assert_equal(result(folder, "cut"), one_node)


@pytest.mark.full
def test_deepspeed_ends_when_a_host_vanishes(hosts, folder, one_node):
    """With the time limits as they are; pdsh waits for the lost host until ssh gives it up."""
    command = hosts[0].command(*DEEPSPEED, "--hostfile", "hosts", TRAIN, "c.py", "name=cut-pdsh", "--continue")
    variables = {"PDSH_SSH_ARGS_APPEND": "-o ServerAliveInterval=15"}
    with (folder / "cut-pdsh.log").open("w") as out:
        process = subprocess.Popen(command, cwd=folder, env=network.environment() | variables, stdout=out, stderr=out)
    try:
        wait_until(lambda: all((folder / f"cut-pdsh-{rank}").exists() for rank in (0, 1)), 300, [process])
        hosts[1].set_link("down")
        began = time.monotonic()
        assert process.wait(300) != 0
        assert time.monotonic() - began < 240
    finally:
        hosts[1].set_link("up")
        process.kill()
    lost = "fastssl: rank 1 is lost on node2 after step"
    assert lost in (folder / "cut-pdsh.log").read_text()
    launch(folder, command)
    assert_equal(result(folder, "cut-pdsh"), one_node)


def submit(slurm: slurm_cluster.Slurm, folder: Path, name: str, *options: str, hold: bool = True) -> str:
    """The number of a job of two nodes with one rank each, submitted by `fastssl slurm`."""
    command = ["--nodes", "2", "--ranks-per-node", "1", "--cpus-per-rank", "1", "--device", "cpu", *options]
    variables = [f"HOLD={folder}/{name}.held"] if hold else []
    fastssl = ["env", *variables, sys.executable, "-m", "fastssl", "slurm", "c.py", f"name={name}"]
    return slurm.run(*fastssl, *command, cwd=folder).split()[1]


def printed(folder: Path, name: str, job: str) -> str:
    return (folder / f"work_dirs/{name}/slurm-{job}.out").read_text()


def test_a_preempted_slurm_job_is_queued_again_and_resumes_to_the_same_bits(slurm, folder, one_node):
    job = submit(slurm, folder, "preempted")
    slurm.wait((folder / "preempted.held").exists, 200)
    urgent = "--partition=urgent --nodes=2 --exclusive --output=/dev/null --wrap=true"
    slurm.run("sbatch", *urgent.split())
    end = slurm.finish(job)
    out = printed(folder, "preempted", job)
    assert (end["JobState"], end["Restarts"], end["ExitCode"]) == ("COMPLETED", "1", "0:0"), out
    assert (
        "; 2 ranks on CPU" in out and "stopped by SIGTERM at step " in out and "continuing work_dirs/preempted" in out
    )
    assert_equal(result(folder, "preempted"), one_node)


@pytest.mark.full
def test_a_slurm_job_saves_before_its_time_limit_and_queues_itself_again(slurm, folder, one_node):
    job = submit(slurm, folder, "limited", "--time", "4", "--grace", "60")
    end = slurm.finish(job, 450)
    out = printed(folder, "limited", job)
    assert (end["JobState"], end["Restarts"], end["ExitCode"]) == ("COMPLETED", "1", "0:0"), out
    assert "stopped by SIGUSR1 at step " in out and "continuing work_dirs/limited" in out
    assert_equal(result(folder, "limited"), one_node)


@pytest.mark.full
def test_a_cancelled_slurm_job_saves_and_stays_cancelled(slurm, folder):
    job = submit(slurm, folder, "cancelled")
    slurm.wait((folder / "cancelled.held").exists, 200)
    slurm.run("scancel", job)
    end = slurm.finish(job)
    assert (end["JobState"], end["Restarts"]) == ("CANCELLED", "0")
    slurm.wait(lambda: "stopped by SIGTERM at step " in printed(folder, "cancelled", job), 60)
    assert list((folder / "work_dirs/cancelled/checkpoints").glob("step_*/manifest.json"))


@pytest.mark.full
def test_two_slurm_jobs_at_once_on_the_same_nodes(slurm, folder, one_node):
    jobs = {name: submit(slurm, folder, name, hold=False) for name in ("first", "second")}
    slurm.wait(lambda: slurm.run("squeue", "--noheader", "--format=%T").split() == ["RUNNING"] * 2, 30)
    for name, job in jobs.items():
        assert slurm.finish(job)["JobState"] == "COMPLETED", printed(folder, name, job)
        assert_equal(result(folder, name), one_node)
