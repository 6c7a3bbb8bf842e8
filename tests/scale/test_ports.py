"""Rank 1 at the port of another job, and at one where rank 0 is not."""

import socket
from datetime import timedelta

import pytest
import torch.distributed as td

from fastssl import dist


@pytest.fixture
def rank_1(monkeypatch):
    """Sets the variables of rank 1 of two, with rank 0 at a port."""
    monkeypatch.setattr(dist, "START", timedelta(seconds=2))

    def set_variables(port: int) -> str:
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
    expected = f"port {where} is in use by another job, whose rank 1 is process 5 on node7: choose one by deepspeed"
    with pytest.raises(ValueError, match=expected):
        dist.init("cpu")


def test_a_rank_waits_for_rank_0_for_a_limited_time(rank_1):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        where = rank_1(closed.getsockname()[1])
    with pytest.raises(ValueError, match=f"rank 1 does not reach rank 0 at {where}: "):
        dist.init("cpu")
