"""Two hosts with one rank each give the losses and the weights of one host with two ranks, by every launcher."""

import json
import subprocess
import sys
from pathlib import Path

import hosts as network
import pytest
import safetensors.torch
import torch

TRAIN = str(Path(__file__).parents[2] / "fastssl" / "train.py")
DEEPSPEED = (sys.executable, "-m", "deepspeed.launcher.runner")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
STEPS = 12
CONFIG = """
from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run, Speed
from fastssl.methods import moco

def get_config():
    return Run(method=moco.Config(dims=(16,), queue=40, momentum=0.9), seed=1, deterministic=True,
               backbone=Backbone("resnet10", stem="cifar", width=8),
               data=Data(train={beton!r}, views=views.moco_v2(16)),
               optim=Optim(lr=0.1, batch=16, epochs=2), speed=Speed(workers=1),
               log=Log(every=1, checkpoint_epochs=0, checkpoint_steps=4, probe=False, tensorboard=False))
"""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """node1 and node2, which reach each other by ssh."""
    network.need_namespaces()
    network.need_programs("sshd", "ssh", "pdsh")
    made = network.Hosts(tmp_path_factory.mktemp("hosts"))
    with made:
        made.start_sshd()
        yield made.hosts


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
    """A rank that cannot host the store ends, and the other host's does not wait for it."""
    first, _ = hosts
    listen = "import socket, time; s = socket.create_server(('', 29503)); print('ready', flush=True); time.sleep(300)"
    other = first.popen(sys.executable, "-c", listen, cwd=folder)
    try:
        assert other.stdout.readline() == "ready\n"
        command = [*DEEPSPEED, "--hostfile", "hosts", "--master_port", "29503", TRAIN, "c.py", "name=taken"]
        done = subprocess.run(
            first.command(*command), cwd=folder, env=network.environment(), capture_output=True, text=True, timeout=200
        )
    finally:
        other.kill()
    assert done.returncode != 0
    assert f"port {first.address}:29503 is in use by another job on this machine" in done.stdout + done.stderr
    assert not (folder / "work_dirs/taken").exists()
