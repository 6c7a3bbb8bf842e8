"""Rank 1 at the port of another job, of another program, and at one where rank 0 is not."""

import socket
from datetime import timedelta

import pytest
import torch.distributed as td

from fastssl import dist, rendezvous


@pytest.fixture
def rank_1(monkeypatch):
    """Sets the variables of rank 1 of two, with rank 0 at a port."""
    dist.shutdown()  # a test before may have left its process group, which dist.init would keep
    monkeypatch.setattr(rendezvous, "CONNECT_TIMEOUT", timedelta(seconds=2))
    monkeypatch.setattr(rendezvous, "ANSWER_S", 2.0)

    def set_variables(port: int | str) -> str:
        variables = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
        return f"127.0.0.1:{port}"

    return set_variables


def test_a_rank_does_not_join_another_job(rank_1):
    store = td.TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=False)
    store.set("fastssl/rank/1", "process 5 on node7")
    where = rank_1(store.port)
    expected = (
        f"port {where} is in use by another job, whose rank 1 is process 5 on node7: choose a free one by deepspeed"
    )
    with pytest.raises(ValueError, match=expected):
        dist.init("cpu")


def test_a_rank_waits_for_rank_0_for_a_limited_time(rank_1):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        where = rank_1(closed.getsockname()[1])
    with pytest.raises(ValueError, match=f"rank 1 does not reach rank 0 at {where}: "):
        dist.init("cpu")


def test_a_rank_does_not_wait_for_a_program_that_never_answers(rank_1):
    """PyTorch's client has no time limit for the answer."""
    with socket.create_server(("127.0.0.1", 0), backlog=50) as silent:
        where = rank_1(silent.getsockname()[1])
        expected = f"port {where} accepts connections and does not answer rank 1: another program listens there, or "
        with pytest.raises(ValueError, match=expected):
            dist.init("cpu")


def test_rank_0_does_not_count_its_own_store_as_a_silent_program(rank_1, monkeypatch):
    port = rendezvous.free_port()
    where = rank_1(port)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(rendezvous, "CONNECT_TIMEOUT", timedelta(seconds=5))
    with pytest.raises(ValueError, match=f"not all ranks have connected to rank 0 at {where}: .*1/2 clients joined"):
        dist.init("cpu")


@pytest.mark.parametrize("port", ["abc", "", "-1", "0", "65536"])
def test_a_port_is_a_number(rank_1, port):
    rank_1(port)
    with pytest.raises(ValueError, match=f"MASTER_PORT='{port}': a port is a number from 1 to 65535"):
        dist.init("cpu")
