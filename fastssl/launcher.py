"""The variables of torchrun (RANK, WORLD_SIZE, ...), set from those of `srun` and `mpirun`.

`deepspeed` and `torchrun` set them themselves.  docs/clusters.md shows the command of each launcher.
"""

from __future__ import annotations

import os
import re

PORT = 29500  # torchrun's and deepspeed's default
SLURM_PORTS = range(15000, 30000)  # below Linux's ephemeral ports, which begin at 32768


def set_variables() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT where `srun` or Open MPI's
    `mpirun` has started several processes.  What is set already stays.  ValueError where the address of rank 0 is not
    known."""
    if "RANK" in os.environ:
        return
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        _from_open_mpi()
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "SLURM_PROCID" in os.environ:
        _from_slurm()


def ranks() -> int:
    """The number of processes that the launcher has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def cores_per_rank() -> int | None:
    """What `srun --cpus-per-task` has given each rank; None where srun has not started the ranks."""
    env = os.environ
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) != ranks() or env.get("SLURM_PROCID") != env.get("RANK"):
        return None
    return int(env["SLURM_CPUS_PER_TASK"]) if "SLURM_CPUS_PER_TASK" in env else None


def _from_slurm() -> None:
    env = os.environ
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", env["SLURM_STEP_TASKS_PER_NODE"])  # "4(x2),3": nodes with 4, 4 and 3
    tasks = [count for count, nodes in parts for _ in range(int(nodes or 1))]
    env.update(
        RANK=env["SLURM_PROCID"],
        WORLD_SIZE=env["SLURM_STEP_NUM_TASKS"],
        LOCAL_RANK=env["SLURM_LOCALID"],
        LOCAL_WORLD_SIZE=tasks[int(env.get("SLURM_NODEID", 0))],
    )
    env.setdefault("MASTER_ADDR", _first_node(env["SLURM_STEP_NODELIST"]))
    step = int(env["SLURM_STEP_ID"]) if env.get("SLURM_STEP_ID", "").isdecimal() else 0
    # Jobs on one node differ in number, steps of one job in step: 7 steps fit between two jobs.
    env.setdefault("MASTER_PORT", str(SLURM_PORTS[(int(env["SLURM_JOB_ID"]) * 7 + step) % len(SLURM_PORTS)]))


def _first_node(nodes: str) -> str:
    """The first of a Slurm node list: "gpu[07-09,12],x" -> "gpu07"; "r[1-2]n[03,04]" -> "r1n03"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if first is None:
        raise ValueError(f"SLURM_STEP_NODELIST={nodes!r} names no node; start with srun, or set MASTER_ADDR")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])


def _from_open_mpi() -> None:
    env = os.environ
    ranks, local = (int(env[f"OMPI_COMM_WORLD_{name}"]) for name in ("SIZE", "LOCAL_SIZE"))
    env.update(
        RANK=env["OMPI_COMM_WORLD_RANK"],
        WORLD_SIZE=str(ranks),
        LOCAL_RANK=env["OMPI_COMM_WORLD_LOCAL_RANK"],
        LOCAL_WORLD_SIZE=str(local),
    )
    if "MASTER_ADDR" not in env and local < ranks:
        raise ValueError(
            f"mpirun started {ranks} ranks, {local} of them on this node, and MASTER_ADDR is not set: name the first "
            "node of the hostfile by mpirun -x MASTER_ADDR=NODE (deepspeed: --launcher_args '-x MASTER_ADDR=NODE')"
        )
    env.setdefault("MASTER_ADDR", "127.0.0.1")
    env.setdefault("MASTER_PORT", str(PORT))
