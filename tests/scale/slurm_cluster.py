"""Slurm on the two hosts of hosts.py: munged and slurmctld on node1, slurmd on both, no cgroups."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import hosts as network

# A job that is queued again waits for `cred_expire` (default 120 s); jobs of "urgent" preempt those of "usual".
CONF = """\
ClusterName=fastssl
SlurmctldHost=node1
SlurmUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
OverTimeLimit=0
NodeName=node[1-2] CPUs=4 State=UNKNOWN
PartitionName=usual Nodes=ALL Default=YES PriorityTier=1
PartitionName=urgent Nodes=ALL PriorityTier=10
"""
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "munged")


class Slurm:
    """Commands run on node1."""

    def __init__(self, hosts: list[network.Host], folder: Path):
        self.first, self.folder = hosts[0], folder
        self.variables = {"SLURM_CONF": str(folder / "slurm.conf")}
        for name in ("state", *(host.name for host in hosts)):
            (folder / name).mkdir()
        (folder / "slurm.conf").write_text(CONF.format(folder=folder))
        (folder / "munge.key").touch(mode=0o600)
        (folder / "munge.key").write_bytes(bytes(range(128)))
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        munged = [f"--{option}={folder}/munge.{suffix}" for option, suffix in files.items()]
        self.first.call("/usr/sbin/munged", "--force", *munged)
        self.run("/usr/sbin/slurmctld")
        for host in hosts:
            self.run("/usr/sbin/slurmd", host=host)
        self.wait(lambda: self.run("sinfo", "--noheader", "--format=%T %D") == "idle 2\n", 60)

    def run(self, *command: str, host: network.Host | None = None, cwd: Path | None = None) -> str:
        env = network.environment() | self.variables
        command = (host or self.first).command(*command)
        done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}{self.logs()}"
        return done.stdout

    def wait(self, condition, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.5)

    def finish(self, job: str, seconds: float = 300) -> dict[str, str]:
        """Wait for the end of a job; its properties as `scontrol show job` prints them."""
        shown: dict[str, str] = {}

        def ended() -> bool:
            text = self.run("scontrol", "--oneliner", "show", "job", job)
            shown.update(word.split("=", 1) for word in text.split() if "=" in word)
            return shown["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")

        self.wait(ended, seconds)
        return shown

    def logs(self) -> str:
        return "\n".join(f"== {file.name}\n{file.read_text()[-1500:]}" for file in sorted(self.folder.glob("*.log")))
