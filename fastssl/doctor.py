"""`fastssl doctor`: is this installation sound?  What is missing is named with the way to get it; exit code 1 if so.

This module imports the standard library alone, and whatever may be broken is tried in processes of its own: a package
that raises, hangs or crashes the interpreter is a finding.
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

MODULES = {"faiss-gpu": "faiss", "cupy-cuda13x": "cupy", "scikit-learn": "sklearn", "pillow": "PIL"}  # others: the name
REMEDIES = (  # of what an import says; see "When FFCV does not install" in docs/install.md
    (r"libGL\.so", "apt-get install libgl1, or pip install --force-reinstall --no-deps opencv-python-headless"),
    (r"libturbojpeg", "apt-get install libturbojpeg0"),
    (r"libopencv", "apt-get install libopencv-dev, then pip install --force-reinstall --no-deps ffcv"),
    (r"torchvision::nms", "pip install -e . (torch and torchvision are not of one release)"),
    (r"numpy.*(dtype size changed|multiarray|_ARRAY_API)", 'pip install "numpy>=2,<2.4"'),
    (r"CUDA_HOME|nvcc", "DS_BUILD_OPS=0 pip install --force-reinstall --no-deps deepspeed"),
)


@dataclass
class Finding:
    level: str  # "ok", "note" (works without), "FAIL"
    what: str
    detail: str
    fix: str = ""

    def __str__(self) -> str:
        text = f"{self.level:<5} {self.what:<16} {self.detail}"
        return text + (f"\n      {'':<16} -> {self.fix}" if self.fix else "")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("fastssl doctor", description="Check this installation and this machine.")
    parser.add_argument("--quick", action="store_true", help="no measurements and no compilation")
    parser.add_argument("--data", help="a .beton to measure the loader with; default: scikit-learn's digits")
    parser.add_argument("--folder", default=".", help="whose disk is measured (default: this one)")
    parser.add_argument("--json", metavar="FILE", help="write the findings, for a bug report")
    parser.add_argument("--probe", choices=tuple(PROBES), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.probe:
        print("\n" + json.dumps(PROBES[args.probe](args)))
        return 0
    findings = []
    for check in CHECKS[:4] if args.quick else CHECKS:
        try:
            found = check(args)
        except Exception as error:  # a doctor that dies of the disease helps nobody
            found = [Finding("FAIL", check.__name__.removeprefix("check_"), f"could not be checked: {error!r}")]
        for finding in found:
            print(finding, flush=True)
        findings += found
    failed = [f.what for f in findings if f.level == "FAIL"]
    print("\n" + (f"{len(failed)} to repair: {', '.join(failed)}" if failed else "nothing to repair"))
    if args.json:
        Path(args.json).write_text(json.dumps([vars(f) for f in findings], indent=1) + "\n")
    return int(bool(failed))


def check_machine(args) -> list[Finding]:
    inside = (3, 10) <= sys.version_info[:2] <= (3, 13)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    out = [
        Finding(
            "ok" if inside else "FAIL",
            "python",
            f"{platform.python_version()}, {sys.executable}",
            "" if inside else "make clean, then make setup PYTHON=python3.13",
        ),
        Finding("ok", "machine", f"{platform.platform()}, {cores} cores, {memory:.0f} GiB memory"),
    ]
    shm = Path("/dev/shm")
    if shm.is_dir() and (size := shutil.disk_usage(shm).total) < 2**28:
        out.append(
            Finding(
                "note",
                "/dev/shm",
                f"{size / 2**20:.0f} MiB: NCCL between several GPUs needs more",
                "docker run --shm-size 8g",
            )
        )
    return out


def check_packages(args) -> list[Finding]:
    """Versions as installed against those that fastssl asks for."""
    try:
        wanted = metadata.requires("fastssl") or []
    except metadata.PackageNotFoundError:
        return [Finding("FAIL", "fastssl", "is not installed", "make setup, or pip install -e .")]
    out = [Finding("ok", "fastssl", metadata.version("fastssl"))]
    for line in wanted:
        requirement, _, marker = (part.strip() for part in line.partition(";"))
        if "extra" in marker and "gpu" not in marker:
            continue
        name = re.match(r"[\w.-]+", requirement)[0]
        need = "note" if marker else "FAIL"
        if marker and not shutil.which("nvidia-smi"):
            continue
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            out.append(Finding(need, name, "is not installed", f'pip install "{requirement}"'))
            continue
        fits = _fits(found, requirement[len(name) :])
        asked = "" if fits else f", asked for is {requirement}"
        out.append(
            Finding(
                "ok" if fits else need,
                name,
                (found or "of no version") + asked,
                "" if fits else f'pip install "{requirement}"',
            )
        )
    return out


def _fits(found: str | None, specifier: str) -> bool:
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:
        return True  # DeepSpeed brings it: its absence is a finding there
    return bool(found) and SpecifierSet(specifier).contains(found, prereleases=True)


IMPORTER = """
import importlib, sys, time
for name in sys.argv[1:]:
    print("begin", name, flush=True)
    began = time.time()
    try:
        importlib.import_module(name)
        print("good", name, f"{time.time() - began:.1f}", flush=True)
    except BaseException as error:
        print("bad", name, f"{type(error).__name__}: {error}".replace(chr(10), " ")[:300], flush=True)
"""


def check_imports(args) -> list[Finding]:
    """All in one process, and what is left in another when one takes the interpreter down."""
    try:
        lines = [line for line in metadata.requires("fastssl") or [] if "extra" not in line]
    except metadata.PackageNotFoundError:
        lines = ["torch", "torchvision", "ffcv", "deepspeed"]
    names = [re.match(r"[\w.-]+", line)[0] for line in lines]
    left = list(dict.fromkeys(MODULES.get(name, name) for name in [*names, "triton", "cv2"]))
    out, took = [], 0.0
    while left:
        done, ending = _child([sys.executable, "-c", IMPORTER, *left], timeout=240)
        name = left[0]
        for line in done.splitlines():
            word, _, rest = line.partition(" ")
            if word == "begin" and rest in left:
                name, left = rest, left[left.index(rest) + 1 :]
            elif word == "good" and rest.startswith(name + " "):
                took, name = took + float(rest.split()[1]), ""
            elif word == "bad" and rest.startswith(name + " "):
                out.append(_broken(name, rest[len(name) + 1 :]))
                name = ""
        if name:  # begun and neither good nor bad
            left = left[1:] if name in left else left
            out.append(_broken(name, f"importing it {ending}"))
    return out or [Finding("ok", "imports", f"all packages, in {took:.0f} s")]


def _broken(name: str, error: str) -> Finding:
    fix = next((fix for pattern, fix in REMEDIES if re.search(pattern, error)), "pip install -e . in this environment")
    return Finding("FAIL", f"import {name}", error, fix)


def check_gpu(args) -> list[Finding]:
    smi = shutil.which("nvidia-smi")
    driver = ""
    if smi:
        listed, _ = _child([smi, "--query-gpu=driver_version,name", "--format=csv,noheader"], timeout=60)
        driver = listed.split(",")[0].strip()
    result = _probe("gpu", args)
    if isinstance(result, str):
        return [Finding("FAIL", "gpu", result, "repair torch first")]
    if result["devices"]:
        return [
            Finding("ok", f"gpu {i}", f"{d}; CUDA {result['cuda']}, driver {driver or 'unknown'}")
            for i, d in enumerate(result["devices"])
        ]
    if smi and driver:
        seen = f"driver {driver} is there and torch (CUDA {result['cuda']}) sees no GPU: {result['why']}"
        return [Finding("FAIL", "gpu", seen, "update the driver to one for that CUDA, or check CUDA_VISIBLE_DEVICES")]
    return [Finding("note", "gpu", "none: training runs on the CPU, which suits small images alone")]


def check_compiler(args) -> list[Finding]:
    """Triton builds a launcher in C for each kernel; on a CPU nothing needs it."""
    cc = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    level = "FAIL" if shutil.which("nvidia-smi") else "note"
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    if not cc:
        return [
            Finding(
                level,
                "compiler",
                "no C compiler: Triton's kernels cannot be built",
                "apt-get install gcc, or train with speed.kernels=reference",
            )
        ]
    import sysconfig

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "a.c"
        source.write_text("#include <Python.h>\nint f(void) { return PY_MAJOR_VERSION; }\n")
        command = [cc, "-shared", "-fPIC", f"-I{sysconfig.get_paths()['include']}", str(source), "-o", f"{folder}/a.so"]
        said, ending = _child(command, timeout=60, errors=True)
    if ending != "ended":
        return [
            Finding(
                level,
                "compiler",
                f"{cc} {ending}: {said.strip()[:200]}",
                f"apt-get install {version}-dev gcc, or train with speed.kernels=reference",
            )
        ]
    return [Finding("ok", "compiler", f"{cc}, with Python's headers")]


def check_kernel(args) -> list[Finding]:
    result = _probe("kernel", args)
    if isinstance(result, str):
        return [Finding("FAIL", "kernel", result, "train with speed.kernels=reference until this is repaired")]
    return [Finding("ok", "kernel", result["detail"])]


def check_disk(args) -> list[Finding]:
    folder = Path(args.folder)
    try:
        free = shutil.disk_usage(folder).free
        written, read = _disk_speed(folder)
    except OSError as error:
        return [Finding("FAIL", "disk", f"{folder}: {error}", "give --folder, where you can write")]
    level = "note" if free < 10 * 2**30 else "ok"
    return [Finding(level, "disk", f"{free / 2**30:.0f} GiB free, writes {written:.0f} MB/s, reads {read:.0f} MB/s")]


def check_loader(args) -> list[Finding]:
    result = _probe("loader", args)
    if isinstance(result, str):
        return [
            Finding(
                "FAIL",
                "loader",
                result,
                "repair what fails above; else see 'When FFCV does not install' in docs/install.md",
            )
        ]
    return [Finding("ok", "loader", result["detail"])]


CHECKS = (
    check_machine,
    check_packages,
    check_imports,
    check_gpu,
    check_compiler,
    check_kernel,
    check_disk,
    check_loader,
)


def _disk_speed(folder: Path) -> tuple[float, float]:
    """MB/s of writing to the disk and of reading back from it, not from memory, where the system lets one say so."""
    block, blocks = os.urandom(2**20), 128
    with tempfile.NamedTemporaryFile(dir=folder) as f:
        began = time.perf_counter()
        for _ in range(blocks):
            f.write(block)
        f.flush()
        os.fsync(f.fileno())
        written = time.perf_counter() - began
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        f.seek(0)
        began = time.perf_counter()
        while f.read(2**20):
            pass
        read = time.perf_counter() - began
    return blocks * 2**20 / 1e6 / written, blocks * 2**20 / 1e6 / read


def _child(command: list[str], timeout: float, errors: bool = False) -> tuple[str, str]:
    """What a process printed and how it ended, in words; "ended" is well."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            env=os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
        )
    except subprocess.TimeoutExpired as error:
        out = error.stdout or b""
        return out.decode(errors="replace") if isinstance(out, bytes) else out, f"did not end in {timeout:.0f} s"
    except OSError as error:
        return "", f"did not start ({error})"
    code = done.returncode
    how = "ended" if code == 0 else f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return done.stdout + (done.stderr if errors else ""), how


def _probe(name: str, args) -> dict | str:
    """The result of a probe below in a process of its own, or what went wrong."""
    command = [sys.executable, "-m", "fastssl.doctor", "--probe", name, *(["--data", args.data] if args.data else [])]
    said, ending = _child(command, timeout=300, errors=True)
    if ending == "ended":
        for line in reversed(said.splitlines()):
            if line.startswith("{"):
                return json.loads(line)
    lines = [line for line in said.splitlines() if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return lines[-1][:300] if lines else f"the check {ending}"


def probe_gpu(args) -> dict:
    import torch

    devices, why = [], ""
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            devices.append(f"{p.name}, {p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor}")
    else:
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            why = str(error).splitlines()[0]
    return {"devices": devices, "cuda": torch.version.cuda or "none", "why": why}


def probe_kernel(args) -> dict:
    """One kernel, forward and backward, against its definition; without a GPU the definition alone."""
    import torch

    from fastssl.kernels.ntxent import ntxent

    cuda = torch.cuda.is_available()
    z = torch.randn(64, 32, device="cuda" if cuda else "cpu")
    results = {}
    for impl in ("reference", "triton")[: 1 + cuda]:
        leaf = z.clone().requires_grad_()
        began = time.perf_counter()
        loss = ntxent(leaf, 0.5, impl=impl)
        loss.backward()
        results[impl] = (loss.item(), leaf.grad, time.perf_counter() - began)
    if not cuda:
        return {"detail": "the PyTorch definitions run; Triton's kernels need a GPU"}
    torch.testing.assert_close(results["triton"][1], results["reference"][1], rtol=1e-3, atol=1e-5)
    return {"detail": f"compiled and equal to its definition, {results['triton'][2]:.1f} s with compilation"}


def probe_loader(args) -> dict:
    from fastssl.loader import Loader

    with tempfile.TemporaryDirectory() as folder:
        path, what = args.data, args.data
        if not path:
            path, what = f"{folder}/digits.beton", "scikit-learn's digits, 8 x 8; --data measures yours"
            command = [sys.executable, "-m", "fastssl", "convert", "digits", "test", path]
            said, ending = _child(command, timeout=200, errors=True)
            if ending != "ended":
                raise RuntimeError(f"fastssl convert {ending}: {said.strip()[-200:]}")
        loader = Loader(path, 64, device="cpu", shuffle=False, drop_last=False)
        next(iter(loader.epoch(0)))  # compiles the pipeline
        count, began = 0, time.perf_counter()
        for batch in loader.epoch(1):
            count += len(batch.index)
            if time.perf_counter() - began > 20:
                break
        rate = count / (time.perf_counter() - began)
    return {"detail": f"{rate:,.0f} images/s ({what})"}


PROBES = {"gpu": probe_gpu, "kernel": probe_kernel, "loader": probe_loader}

if __name__ == "__main__":
    sys.exit(main())
