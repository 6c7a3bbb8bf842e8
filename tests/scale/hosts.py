"""Two hosts on one machine: network namespaces with an address, a host name and an sshd each, joined by a cable (veth).

They share the file system, as nodes of a cluster share the folder of a run.  A host's file system differs from the
machine's in /etc/hosts and in ssh's configuration, which are mounted over it for the host's own processes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGES = "openssh-server pdsh openmpi-bin slurm-wlm munge iproute2"  # as in tools/setup.sh
# The arguments are the host's name, the folder of its files, and the command.
ENTER = """
hostname "$1" && mount --bind "$2/hosts" /etc/hosts && mount --bind "$2/ssh_config" /etc/ssh/ssh_config && shift 2 &&
exec "$@"
"""
SSH = """Host *
IdentityFile {folder}/key
IdentitiesOnly yes
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
"""
SSHD = """ListenAddress {address}:22
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
PidFile {folder}/sshd_{name}.pid
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
"""
ENV = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
OF_A_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "PYTEST_CURRENT_TEST")


def environment() -> dict[str, str]:
    """This process's variables without those that earlier tests have set for a process group."""
    return {k: v for k, v in os.environ.items() if k not in OF_A_LAUNCHER} | ENV


def call(*command: str) -> str:
    """The output of a command; the error has what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def need_programs(*names: str) -> None:
    """Skip the test where programs are missing; fail it with CI set, where tools/setup.sh has to install them."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"  # where Debian has daemons
    missing = [name for name in names if shutil.which(name, path=path) is None]
    if missing:
        message = f"{', '.join(missing)} not found; Debian: apt-get install {PACKAGES}"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)


def need_namespaces() -> None:
    """Skip the test where the machine refuses network namespaces."""
    if reason := _refused():
        pytest.skip(f"network namespaces: {reason}")


def _refused() -> str | None:
    if os.geteuid() != 0:
        return "they need root"
    need_programs("ip")
    name = f"fastssl-{os.getpid()}"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if done.returncode == 0:
        enter = ["nsenter", f"--net=/run/netns/{name}", "unshare", "--uts", "--mount"]
        inside = [*enter, "sh", "-c", "hostname x && ip link add eth0 type veth peer name eth1"]
        done = subprocess.run(inside, capture_output=True, text=True)
        call("ip", "netns", "del", name)
    return None if done.returncode == 0 else " ".join(done.stderr.split())


@dataclass(frozen=True)
class Host:
    name: str
    address: str
    folder: Path

    @property
    def namespace(self) -> str:
        return f"fastssl-{os.getpid()}-{self.name}"

    def command(self, *command: str) -> list[str]:
        """`command`, to be started on this host."""
        enter = ["nsenter", f"--net=/run/netns/{self.namespace}", "unshare", "--uts", "--mount"]
        return [*enter, "sh", "-c", ENTER, "sh", self.name, str(self.folder), *map(str, command)]

    def call(self, *command: str) -> str:
        return call(*self.command(*command))

    def set_link(self, state: str) -> None:
        """`state`: "down" as if the cable were pulled (what is sent is lost, and no connection is closed), or "up"."""
        call(*f"ip -n {self.namespace} link set eth0 {state}".split())

    def popen(self, *command: str, cwd: Path, **variables: str) -> subprocess.Popen:
        return subprocess.Popen(
            self.command(*command),
            cwd=cwd,
            env=environment() | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


class Hosts:
    """node1 and node2, from `with` to its end; every process that still runs on them is then ended."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.hosts = [Host(f"node{i}", f"10.77.0.{i}", folder) for i in (1, 2)]

    def __enter__(self) -> list[Host]:
        call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / "key"))
        names = "".join(f"{host.address} {host.name}\n" for host in self.hosts)
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        (self.folder / "ssh_config").write_text(SSH.format(folder=self.folder))
        for host in self.hosts:
            call("ip", "netns", "add", host.namespace)
        first, second = (host.namespace for host in self.hosts)
        call(*f"ip link add eth0 netns {first} type veth peer name eth0 netns {second}".split())
        for host in self.hosts:
            call(*f"ip -n {host.namespace} addr add {host.address}/24 dev eth0".split())
            for device in ("lo", "eth0"):
                call(*f"ip -n {host.namespace} link set {device} up".split())
        return self.hosts

    def start_sshd(self) -> None:
        Path("/run/sshd").mkdir(exist_ok=True)  # where sshd separates its privileges
        for host in self.hosts:
            file = self.folder / f"sshd_{host.name}"
            file.write_text(SSHD.format(folder=self.folder, address=host.address, name=host.name))
            host.call("/usr/sbin/sshd", "-f", str(file), "-E", f"{file}.log")

    def __exit__(self, *_) -> None:
        for host in self.hosts:
            if pids := call("ip", "netns", "pids", host.namespace).split():
                subprocess.run(["kill", "-KILL", *pids], stderr=subprocess.DEVNULL)
            call("ip", "netns", "del", host.namespace)
