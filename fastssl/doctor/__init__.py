"""`fastssl doctor`: checks this installation and names the repair; exit code 1 if something must be repaired.

This module imports the standard library only.  Packages are imported in other processes, so that one that raises, hangs
or crashes the interpreter is reported.
"""

from __future__ import annotations

import argparse
import importlib.metadata as metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# Packages whose module has another name
MODULES = {"faiss-gpu": "faiss", "cupy-cuda13x": "cupy", "scikit-learn": "sklearn", "pillow": "PIL"}
REMEDIES = (  # (pattern in the error of an import, remedy); see "When FFCV does not install" in docs/install.md
    (r"libGL\.so", "apt-get install libgl1, or pip install --force-reinstall --no-deps opencv-python-headless"),
    (r"libturbojpeg", "apt-get install libturbojpeg0"),
    (r"libopencv", "apt-get install libopencv-dev, then pip install --force-reinstall --no-deps ffcv"),
    (r"torchvision::nms", "pip install -e . (torch and torchvision are not of one release)"),
    (r"numpy.*(dtype size changed|multiarray|_ARRAY_API)", 'pip install "numpy>=2,<2.4"'),
    (r"CUDA_HOME|nvcc", "DS_BUILD_OPS=0 pip install --force-reinstall --no-deps deepspeed"),
)


Level = Literal["ok", "note", "FAIL"]


@dataclass
class Finding:
    level: Level  # "note": fastssl works without it
    what: str
    detail: str
    fix: str = ""

    def __str__(self) -> str:
        text = f"{self.level:<5} {self.what:<16} {self.detail}"
        return text + (f"\n      {'':<16} -> {self.fix}" if self.fix else "")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "fastssl doctor", allow_abbrev=False, description="Check this installation and this machine."
    )
    parser.add_argument("--quick", action="store_true", help="no measurements and no compilation")
    parser.add_argument("--data", help="a .beton to measure the loader with; default: scikit-learn's digits")
    parser.add_argument("--folder", default=".", help="the folder whose disk is measured (default: this one)")
    parser.add_argument("--json", metavar="FILE", help="write the findings, for a bug report")
    parser.add_argument("--plan", metavar="CONFIG", help="the memory that a run of this config needs on each GPU")
    parser.add_argument("--gpus", type=int, default=1, help="of the plan (default: 1)")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings that replace those of CONFIG")
    args = parser.parse_intermixed_args(argv)
    if args.plan:
        from fastssl import parsing
        from fastssl.plan import report  # torch

        return parsing.run_command("doctor", lambda: print(report(args.plan, args.overrides, args.gpus)))
    if args.overrides:
        parser.error(f"{args.overrides[0]} needs --plan CONFIG")
    findings = []
    for check in QUICK if args.quick else CHECKS:
        try:
            found = check(args)
        except Exception as error:  # of any type; the other checks go on
            found = [Finding("FAIL", check.__name__.removeprefix("check_"), f"could not be checked: {error!r}")]
        for finding in found:
            print(finding, flush=True)
        findings += found
    failed = [f.what for f in findings if f.level == "FAIL"]
    print("\n" + (f"{len(failed)} to repair: {', '.join(failed)}" if failed else "nothing to repair"))
    if args.json:
        Path(args.json).write_text(json.dumps([vars(f) for f in findings], indent=1) + "\n")
    return int(bool(failed))


def check_machine(args: argparse.Namespace) -> list[Finding]:
    supported = (3, 10) <= sys.version_info[:2] <= (3, 13)
    version = f"{platform.python_version()}, {sys.executable}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    out = [
        Finding("ok", "python", version)
        if supported
        else Finding("FAIL", "python", version, "make clean, then make setup PYTHON=python3.13"),
        Finding("ok", "machine", f"{platform.platform()}, {cores} cores, {memory:.0f} GiB memory"),
    ]
    shm = Path("/dev/shm")
    if shm.is_dir() and (size := shutil.disk_usage(shm).total) < 2**28:
        detail = f"{size / 2**20:.0f} MiB: NCCL between several GPUs needs more"
        out.append(Finding("note", "/dev/shm", detail, "docker run --shm-size 8g"))
    return out


def check_packages(args: argparse.Namespace) -> list[Finding]:
    """Installed versions against those that fastssl requires."""
    try:
        requirements = metadata.requires("fastssl") or []
    except metadata.PackageNotFoundError:
        return [Finding("FAIL", "fastssl", "is not installed", "make setup, or pip install -e .")]
    out = [Finding("ok", "fastssl", metadata.version("fastssl"))]
    for line in requirements:
        requirement, _, marker = (part.strip() for part in line.partition(";"))
        if marker and (("extra" in marker and "gpu" not in marker) or not shutil.which("nvidia-smi")):
            continue
        out.append(_check_package(requirement, "note" if marker else "FAIL"))
    return out


def _name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0]


def _check_package(requirement: str, level: Level) -> Finding:
    name, fix = _name(requirement), f'pip install "{requirement}"'
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(level, name, "is not installed", fix)
    try:
        from packaging.specifiers import SpecifierSet

        fits = found is not None and SpecifierSet(requirement[len(name) :]).contains(found, prereleases=True)
    except ImportError:  # a requirement of DeepSpeed, where its absence is found
        fits = True
    if fits:
        return Finding("ok", name, found)
    return Finding(level, name, f"{found or 'of no version'}, required is {requirement}", fix)


IMPORTER = """
import importlib, sys
for name in sys.argv[1:]:
    print("import", name, flush=True)
    try:
        importlib.import_module(name)
    except BaseException as error:
        print("error", name, f"{type(error).__name__}: {error}".replace(chr(10), " ")[:300], flush=True)
print("imported all", flush=True)
"""


def check_imports(args: argparse.Namespace) -> list[Finding]:
    """Imports all packages in one process; if one ends the process, the rest in another."""
    try:
        lines = [line for line in metadata.requires("fastssl") or [] if "extra" not in line]
    except metadata.PackageNotFoundError:
        lines = ["torch", "torchvision", "ffcv", "deepspeed"]
    names = [_name(line) for line in lines]
    left = list(dict.fromkeys(MODULES.get(name, name) for name in [*names, "triton", "cv2"]))
    out, start = [], time.time()
    while left:
        output, ending = _run([sys.executable, "-c", IMPORTER, *left], timeout=240)
        errors = re.findall(r"^error (\S+) (.*)$", output, re.M)
        out += [_broken(name, error) for name, error in errors if name in left]
        if "\nimported all\n" in output:
            break
        begun = [name for name in re.findall(r"^import (\S+)$", output, re.M) if name in left]
        last = begun[-1] if begun else left[0]
        out.append(_broken(last, f"importing it {ending}"))
        left = left[left.index(last) + 1 :]
    return out or [Finding("ok", "imports", f"all packages, in {time.time() - start:.0f} s")]


def _broken(name: str, error: str) -> Finding:
    fix = next((fix for pattern, fix in REMEDIES if re.search(pattern, error)), "pip install -e . in this environment")
    return Finding("FAIL", f"import {name}", error, fix)


def check_gpu(args: argparse.Namespace) -> list[Finding]:
    smi = shutil.which("nvidia-smi")
    driver = ""
    if smi:
        listed, _ = _run([smi, "--query-gpu=driver_version,name", "--format=csv,noheader"], timeout=60)
        driver = listed.split(",")[0].strip()
    result = _probe("gpu", args)
    if isinstance(result, str):
        return [Finding("FAIL", "gpu", result, "repair torch first")]
    if result["devices"]:
        versions = f"CUDA {result['cuda']}, driver {driver or 'unknown'}"
        return [Finding("ok", f"gpu {i}", f"{device}; {versions}") for i, device in enumerate(result["devices"])]
    if smi and driver:
        detail = f"driver {driver} is there and torch (CUDA {result['cuda']}) sees no GPU: {result['reason']}"
        return [Finding("FAIL", "gpu", detail, "update the driver to one for that CUDA, or check CUDA_VISIBLE_DEVICES")]
    return [Finding("note", "gpu", "none: training runs on the CPU, fast enough for small images only")]


def check_compiler(args: argparse.Namespace) -> list[Finding]:
    """Triton builds a launcher in C for each kernel; on a CPU nothing needs it."""
    import sysconfig

    cc = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    level: Level = "FAIL" if shutil.which("nvidia-smi") else "note"
    otherwise = "or train with speed.kernels=reference"
    if not cc:
        detail = "no C compiler: Triton's kernels cannot be built"
        return [Finding(level, "compiler", detail, f"apt-get install gcc, {otherwise}")]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "a.c"
        source.write_text("#include <Python.h>\nint f(void) { return PY_MAJOR_VERSION; }\n")
        command = [cc, "-shared", "-fPIC", f"-I{sysconfig.get_paths()['include']}", str(source), "-o", f"{folder}/a.so"]
        output, ending = _run(command, timeout=60, errors=True)
    if ending != "ended":
        headers = f"python{sys.version_info[0]}.{sys.version_info[1]}-dev"
        detail = f"{cc} {ending}: {output.strip()[:200]}"
        return [Finding(level, "compiler", detail, f"apt-get install {headers} gcc, {otherwise}")]
    return [Finding("ok", "compiler", f"{cc}, with Python's headers")]


def check_kernel(args: argparse.Namespace) -> list[Finding]:
    return _check_probe("kernel", args, "train with speed.kernels=reference until this is repaired")


def check_disk(args: argparse.Namespace) -> list[Finding]:
    folder = Path(args.folder)
    try:
        free = shutil.disk_usage(folder).free
        written, read = _disk_speed(folder)
    except OSError as error:
        return [Finding("FAIL", "disk", f"{folder}: {error}", "give --folder, where you can write")]
    level: Level = "note" if free < 10 * 2**30 else "ok"
    return [Finding(level, "disk", f"{free / 2**30:.0f} GiB free, writes {written:.0f} MB/s, reads {read:.0f} MB/s")]


def check_loader(args: argparse.Namespace) -> list[Finding]:
    fix = "repair what fails above; else see 'When FFCV does not install' in docs/install.md"
    return _check_probe("loader", args, fix)


def _check_probe(name: str, args: argparse.Namespace, fix: str) -> list[Finding]:
    result = _probe(name, args)
    return [Finding("FAIL", name, result, fix) if isinstance(result, str) else Finding("ok", name, result["detail"])]


QUICK = (check_machine, check_packages, check_imports, check_gpu)
CHECKS = (*QUICK, check_compiler, check_kernel, check_disk, check_loader)


def _disk_speed(folder: Path) -> tuple[float, float]:
    """MB/s of writing to the disk and of reading back, from the disk itself where the system can drop its cache."""
    block, blocks = os.urandom(2**20), 128
    with tempfile.NamedTemporaryFile(dir=folder) as f:
        start = time.perf_counter()
        for _ in range(blocks):
            f.write(block)
        f.flush()
        os.fsync(f.fileno())
        written = time.perf_counter() - start
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        f.seek(0)
        start = time.perf_counter()
        while f.read(2**20):
            pass
        read = time.perf_counter() - start
    return blocks * 2**20 / 1e6 / written, blocks * 2**20 / 1e6 / read


def _run(command: list[str], timeout: float, errors: bool = False) -> tuple[str, str]:
    """What a process printed, and how it ended in words; "ended" is a success."""
    try:
        env = {"OMP_NUM_THREADS": "1", **os.environ}
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout, env=env)
    except subprocess.TimeoutExpired as error:
        out = error.stdout or b""
        return out.decode(errors="replace") if isinstance(out, bytes) else out, f"did not end in {timeout:.0f} s"
    except OSError as error:
        return "", f"did not start ({error})"
    code = done.returncode
    how = "ended" if code == 0 else f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return done.stdout + (done.stderr if errors else ""), how


def _probe(name: str, args: argparse.Namespace) -> dict | str:
    """The result of a probe (probes.py), or what went wrong."""
    command = [sys.executable, "-m", "fastssl.doctor.probes", name, *(["--data", args.data] if args.data else [])]
    output, ending = _run(command, timeout=300, errors=True)
    if ending == "ended":
        for line in reversed(output.splitlines()):
            if line.startswith("{"):
                return json.loads(line)
    lines = [line for line in output.splitlines() if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return lines[-1][:300] if lines else f"the check {ending}"


if __name__ == "__main__":
    sys.exit(main())
