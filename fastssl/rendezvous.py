"""The store at MASTER_ADDR:MASTER_PORT by which the ranks of torch.distributed find each other."""

from __future__ import annotations

import os
import socket
import threading
import time
from datetime import timedelta
from typing import Any

import torch.distributed as td

CONNECT_TIMEOUT = timedelta(minutes=10)  # until all ranks have connected: nodes do not start at the same moment
ANSWER_S = 60.0  # rank 0 answers at once; what accepts connections for so long without an answer is another program
REMEDY = (
    "choose a free one by deepspeed --master_port N (torchrun: --standalone, or --master_port N; srun and mpirun: "
    "MASTER_PORT=N)"
)


def connect() -> td.Store:
    """Wait for the store, by the variables RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.  ValueError where the port is
    in use by another job or program, or not all ranks connect within CONNECT_TIMEOUT."""
    port, lowest = os.environ["MASTER_PORT"], 0 if os.environ["WORLD_SIZE"] == "1" else 1  # 0: any free one
    if not (port.isdecimal() and lowest <= int(port) <= 65535):
        raise ValueError(f"MASTER_PORT={port!r}: a port is a number from {lowest} to 65535")
    rank, where = os.environ["RANK"], f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store = _connect()
    except TimeoutError:
        raise ValueError(
            f"port {where} accepts connections and does not answer rank {rank}: another program listens there, or "
            f"MASTER_ADDR is not the node of rank 0; {REMEDY}"
        ) from None
    except td.DistError as error:
        if "EADDRINUSE" in str(error):
            raise ValueError(f"port {where} is in use by another job on this machine: {REMEDY}") from None
        what = f"rank {rank} does not reach rank 0" if rank != "0" else "not all ranks have connected to rank 0"
        raise ValueError(f"{what} at {where}: {error}") from None
    # Rank 0 of a second job at the same port fails; its other ranks would join the first job.
    me = f"process {os.getpid()} on {socket.gethostname()}"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # torchrun has checked the job's name
        first = store.compare_set(f"fastssl/rank/{rank}", "", me).decode()
        if first != me:
            raise ValueError(f"port {where} is in use by another job, whose rank {rank} is {first}: {REMEDY}")
    return store


def _connect() -> td.Store:
    """Connect in a thread, since PyTorch waits without end for the answer of a program that accepts its connection.
    TimeoutError after ANSWER_S of such a wait."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(next(td.rendezvous("env://", timeout=CONNECT_TIMEOUT))[0])
        except Exception as error:  # of any type: it is raised in the main thread
            outcome.append(error)

    thread = threading.Thread(target=run, name="fastssl-rendezvous", daemon=True)
    thread.start()
    end = time.monotonic() + CONNECT_TIMEOUT.total_seconds() + ANSWER_S  # PyTorch ends soon after CONNECT_TIMEOUT
    unanswered = 0.0
    while thread.is_alive() and unanswered < ANSWER_S and time.monotonic() < end:
        thread.join(1.0)
        # rank 0's own store listens while it waits for the others
        unanswered = unanswered + 1.0 if os.environ["RANK"] != "0" and _is_listening() else 0.0
    if not outcome:
        raise TimeoutError if unanswered else td.DistStoreError(f"no connection in {CONNECT_TIMEOUT}")
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def _is_listening() -> bool:
    """Whether a program accepts connections at the port."""
    try:
        with socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), 1.0):
            return True
    except OSError:
        return False


def free_port() -> int:
    """A port of this machine that no program listens at."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
