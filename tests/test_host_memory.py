"""Free memory of the machine, within the limits of control groups of both versions, and what the loader takes of it."""

import gc
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from bare_trainer import bare_trainer

from fastssl import host_memory, loader
from fastssl.engine import batches
from fastssl.meters import Meter
from fastssl.sampler import Sampler

MIB = 1 << 20


def machine(root: Path, groups: str, **files: str) -> Path:
    """A file system with 900 MiB free and the files of control groups, which belong to /sys/fs/cgroup."""
    for name, text in {
        "proc/meminfo": "MemTotal: 9999999 kB\nMemAvailable: 921600 kB",
        "proc/self/cgroup": groups,
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    for name, text in files.items():
        (root / "sys/fs/cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "sys/fs/cgroup" / name).write_text(text)
    return root


def group(version: int, limit: int | str, use: int, cached: int = 0) -> dict[str, str]:
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    total = "total_" if version == 1 else ""
    stat = f"anon 5\n{total}inactive_file {cached * MIB}\n{total}active_file 0\ninactive_anon 7\n"
    limit = limit if isinstance(limit, str) else str(limit * MIB)
    return {names[0]: limit, names[1]: str(use * MIB), "memory.stat": stat}


def at(folder: str, files: dict[str, str]) -> dict[str, str]:
    return {f"{folder}/{name}": text for name, text in files.items()}


@pytest.mark.parametrize(
    "groups, files, free",
    [
        ("0::/", {}, 900),
        ("0::/a/b", at("a/b", group(2, 500, 200)), 300),
        ("0::/a/b", at("a/b", group(2, 500, 200, cached=150)), 450),
        ("0::/a", {"a/memory.max": str(500 * MIB), "a/memory.current": str(200 * MIB)}, 300),  # no memory.stat
        ("0::/a/b", at("a/b", group(2, "max", 200)) | at("a", group(2, 600, 350)), 250),
        ("0::/a/b", at("a/b", group(2, 5000, 200)), 900),
        ("0::/a/b", at("a/b", group(2, 100, 200)), 0),
        ("0::/../host/scope", at(".", group(2, 500, 100)), 400),
        ("1:name=systemd:/\n0::/a", at("unified/a", group(2, 500, 100)), 400),
        ("4:memory:/a/b\n0::/", at("memory/a/b", group(1, 500, 200, cached=50)), 350),
        (
            "4:cpu,memory:/a/b",
            at("memory/a/b", group(1, "9223372036854771712", 9)) | at("memory/a", group(1, 90, 80)),
            10,
        ),
        ("4:cpu:/a", at("memory/a", group(1, 500, 200)), 900),
    ],
)
def test_the_smaller_of_free_memory_and_what_a_control_group_leaves(tmp_path, groups, files, free):
    assert host_memory.free_bytes(machine(tmp_path, groups, **files)) == free * MIB


def test_a_kernel_without_control_groups(tmp_path):
    machine(tmp_path, "")
    (tmp_path / "proc/self/cgroup").unlink()
    assert host_memory.free_bytes(tmp_path) == 900 * MIB


@pytest.mark.parametrize("shared, free", [("", 300), ("Shmem: 51200 kB\n", 250)])
def test_a_kernel_without_an_estimate_of_available_memory(tmp_path, shared, free):
    machine(tmp_path, "0::/")
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: 9999999 kB\nMemFree: 204800 kB\nCached: 102400 kB\n{shared}")
    assert host_memory.free_bytes(tmp_path) == free * MIB


def test_a_real_control_group():
    """The child is in a group of 300 MiB, of which the interpreter takes some."""
    parents = [Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")]
    parent = next((p for p in parents if (p / "cgroup.procs").exists()), None)
    if parent is None or not os.access(parent, os.W_OK):
        pytest.skip("control groups of this machine cannot be changed")
    made = parent / f"fastssl-{os.getpid()}"
    try:
        made.mkdir()
        limit = next((made / n for n in ("memory.max", "memory.limit_in_bytes") if (made / n).exists()), None)
        if limit is None:
            pytest.skip("the memory controller is not on")
        limit.write_text(str(300 * MIB))
        code = "from fastssl import host_memory; print(host_memory.free_bytes())"
        enter = f"echo $$ > {made}/cgroup.procs && exec {sys.executable} -c '{code}'"
        done = subprocess.run(["sh", "-c", enter], capture_output=True, text=True, check=True)
        assert 200 * MIB < int(done.stdout) < 300 * MIB
    except OSError as error:
        pytest.skip(f"control groups of this machine cannot be changed: {error}")
    finally:
        if made.exists():
            made.rmdir()


@pytest.mark.parametrize("micro", [1, 4])
def test_the_memory_that_is_checked_holds_all_buffers_of_a_training_loop(beton, monkeypatch, micro):
    free = [0]
    monkeypatch.setattr(loader, "free_memory", lambda device: free[0])
    with pytest.raises(ValueError) as refused:
        loader.Loader(beton, 16, Sampler(micro_per_step=micro), device="cpu", workers=2)
    (count,) = re.findall(r"for (\d+) micro-batches of", str(refused.value))
    free[0] = 2**40
    opened = loader.Loader(beton, 16, Sampler(micro_per_step=micro), device="cpu", workers=2)
    trainer = bare_trainer(None, opened, total_steps=12, meter=Meter("cpu", batch=16))
    for _, micro_batches in batches(trainer, lambda t, start: None):
        assert len(micro_batches) == micro
        opened._prefetcher.submit(lambda: None).result()  # after all that is decoded in advance
    del micro_batches
    gc.collect()
    assert int(count) - 1 <= len(opened._free) <= int(count)  # one fewer where decoding is slower than the loop
