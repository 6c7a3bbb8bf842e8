"""The doctor reports each kind of broken installation and does not fail itself."""

import argparse
import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastssl import doctor
from fastssl.doctor import probes

NAMES = ("torch", "torchvision", "ffcv", "deepspeed", "numba", "triton", "cv2", "timm")


def run(folder, *argv):
    """Run the doctor with the packages in `folder` first on the path; the large ones are empty stubs, for speed."""
    for name in NAMES:
        (folder / name).mkdir(exist_ok=True)
        if not (folder / name / "__init__.py").exists():
            (folder / name / "__init__.py").write_text("")
    env = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-m", "fastssl", "doctor", "--quick", *argv],
        capture_output=True,
        text=True,
        env=env,
        cwd=folder,
    )
    assert "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    return done.returncode, done.stdout


def package(folder, name, text):
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(text)


def claim(folder, *requirements):
    """Write the metadata of an installed fastssl."""
    info = folder / "fastssl-0.1.0.dist-info"
    info.mkdir()
    lines = "".join(f"Requires-Dist: {r}\n" for r in requirements)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: fastssl\nVersion: 0.1.0\n{lines}")


GPU = """
class cuda:
    is_available = staticmethod(lambda: {there})
    device_count = staticmethod(lambda: 1)
    @staticmethod
    def get_device_properties(i):
        return type("P", (), dict(name="X100", total_memory=2**36, major=9, minor=0))
    @staticmethod
    def init():
        raise RuntimeError("driver too old")
class version:
    cuda = "13.0"
"""


def test_a_complete_installation_passes(tmp_path):
    claim(tmp_path, "torch", "numpy>=2")
    package(tmp_path, "torch", GPU.format(there=True))
    info = tmp_path / "torch-2.11.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.11.0\n")
    code, out = run(tmp_path, "--json", str(tmp_path / "found.json"))
    assert code == 0 and "nothing to repair" in out and "FAIL" not in out, out
    assert "X100, 64 GiB, sm_90; CUDA 13.0" in out
    found = json.loads((tmp_path / "found.json").read_text())
    assert {"level": "ok", "what": "torch", "detail": "2.11.0", "fix": ""} in found


def test_each_fault_is_reported_with_its_remedy(tmp_path):
    claim(
        tmp_path, "torch", "ffcv", "deepspeed", "numba", "timm", "numpy<2", "not-there-at-all>=3", "rich; extra == 'x'"
    )
    package(tmp_path, "torch", "raise OSError('libcudart.so.13: cannot open shared object file')")
    package(tmp_path, "ffcv", "import os\nos.kill(os.getpid(), 11)")
    package(tmp_path, "deepspeed", "raise SystemExit(3)")
    package(tmp_path, "numba", "import os\nos._exit(7)")
    package(tmp_path, "cv2", "raise ImportError('libGL.so.1: cannot open shared object file')")
    code, out = run(tmp_path)
    assert code == 1

    def finding(what):
        match = re.search(rf"^FAIL  {re.escape(what)} +(.*)\n +-> (.*)$", out, re.M)
        assert match, out
        return match.groups()

    assert "libcudart" in finding("import torch")[0]
    assert finding("import ffcv")[0] == "importing it was killed by signal 11"
    assert finding("import deepspeed")[0] == "SystemExit: 3"
    assert finding("import numba")[0] == "importing it ended with exit code 7"
    assert "libgl1" in finding("import cv2")[1]
    assert finding("not-there-at-all") == ("is not installed", 'pip install "not-there-at-all>=3"')
    assert "required is numpy<2" in finding("numpy")[0]
    assert "OSError: libcudart" in finding("gpu")[0]
    assert "import timm" not in out and "rich" not in out
    assert re.search(r"^\d+ to repair: numpy, not-there-at-all, import ", out, re.M), out


def test_missing_packages_are_reported(tmp_path):
    """The file alone, without fastssl's metadata: `-S` hides site-packages."""
    command = [sys.executable, "-S", doctor.__file__, "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "fastssl          is not installed" in done.stdout and not done.stderr


def test_a_driver_is_reported_if_torch_sees_no_gpu(tmp_path, monkeypatch):
    claim(tmp_path, "numpy")
    package(tmp_path, "torch", GPU.format(there=False))
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\necho 470.1, X100\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{smi.parent}:{os.environ['PATH']}")
    code, out = run(tmp_path)
    assert code == 1 and "driver 470.1 is there" in out and "driver too old" in out and "update the driver" in out


def test_a_process_that_hangs_is_ended_and_described(tmp_path, monkeypatch):
    output, ending = doctor._run([sys.executable, "-c", "print('begin x', flush=True); import time; time.sleep(60)"], 3)
    assert output == "begin x\n" and ending == "did not end in 3 s"
    assert doctor._run([str(tmp_path / "no-such-program")], 1)[1].startswith("did not start")


def test_a_check_that_fails_is_a_finding(monkeypatch, capsys):
    def check_moon(args):
        raise RuntimeError("no moon")

    monkeypatch.setattr(doctor, "CHECKS", (check_moon,))
    assert doctor.main([]) == 1
    assert "FAIL  moon" in capsys.readouterr().out


def test_the_compiler_and_the_disk_are_checked(tmp_path, monkeypatch):
    args = argparse.Namespace(folder=str(tmp_path))
    (disk,) = doctor.check_disk(args)
    assert disk.level in ("ok", "note") and re.search(r"writes [1-9]\d* MB/s, reads [1-9]\d* MB/s", disk.detail)
    assert doctor.check_disk(argparse.Namespace(folder=str(tmp_path / "none")))[0].level == "FAIL"
    fake = tmp_path / "cc"
    fake.write_text("#!/bin/sh\necho 'fatal error: Python.h: no such file' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CC", str(fake))
    (compiler,) = doctor.check_compiler(args)
    assert compiler.level in ("note", "FAIL") and "Python.h" in compiler.detail and "-dev" in compiler.fix


def test_kernel_probe_runs():
    assert "run" in probes.kernel(None)["detail"] or "equal" in probes.kernel(None)["detail"]


def test_loader_probe_runs(beton):
    rate = re.match(r"([\d,]+) images/s", probes.loader(argparse.Namespace(data=str(beton)))["detail"])
    assert int(rate[1].replace(",", "")) > 0


def test_the_doctor_imports_the_standard_library_alone():
    tree = ast.parse(Path(doctor.__file__).read_text())
    names = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names


@pytest.mark.parametrize(
    "error, fix",
    [
        ("ImportError: libturbojpeg.so.0: cannot open", "libturbojpeg0"),
        ("RuntimeError: operator torchvision::nms does not exist", "pip install -e ."),
        ("ValueError: numpy.dtype size changed", "numpy>=2"),
    ],
)
def test_every_known_import_error_has_a_remedy(error, fix):
    assert fix in doctor._broken("x", error).fix
