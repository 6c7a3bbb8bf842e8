"""A disk that is full or read-only while something is written to it: one line that names the file, nothing half
written, what was there before as it was.  The disk is a small file system in memory, mounted for these tests."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "methods"))
import method_cases as cases

from fastssl import __main__ as command
from fastssl import backbones, dist, engine, views
from fastssl.config import Backbone
from fastssl.eval.common import cache
from fastssl.eval.common.features import Extractor
from fastssl.loader import Loader
from fastssl.sampler import Sampler


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A file system of 8 MB."""
    folder = tmp_path_factory.mktemp("disk")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"this machine mounts no file system: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(file: Path) -> None:
    with open(file, "wb", buffering=0) as out:
        try:
            while out.write(bytes(1 << 12)):
                pass
        except OSError as error:
            assert error.errno == errno.ENOSPC


@pytest.fixture(params=["full", "read-only"])
def broken(request, disk):
    """break_() makes the disk full or read-only and returns the error that writing to it gives."""

    def break_() -> str:
        if request.param == "full":
            fill(disk / "filler")
            return os.strerror(errno.ENOSPC)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        return os.strerror(errno.EROFS)

    yield break_
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    subprocess.run(["find", disk, "-mindepth", "1", "-delete"], check=True)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of two steps of a ResNet with a stem of ImageNet's, which every target of `fastssl export` has."""
    run = cases.run("simclr", steps=2, norm=False)
    run.backbone = Backbone("resnet18", width=64)
    run.name, run.log.root, run.log.collapse_every = "small", str(tmp_path_factory.mktemp("runs")), 0
    dist.init("cpu")
    t = engine.fit(run, hooks=[], device="cpu", loader=cases.loader(run))
    dist.shutdown()
    return t.folder


def files_of(disk: Path) -> dict[str, bytes]:
    return {str(p.relative_to(disk)): p.read_bytes() for p in disk.rglob("*") if p.is_file() and p.name != "filler"}


def check(disk, break_, capsys, argv: list[str]) -> None:
    before, reason = files_of(disk), break_()
    capsys.readouterr()
    code = command.main(argv)
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.count("\n") == 1 and reason in error and str(disk) in error, error
    assert files_of(disk) == before


@pytest.mark.parametrize("to", ["torchvision", "timm", "safetensors", "detectron2", "huggingface"])
def test_a_failing_disk_ends_an_export_with_one_line(run_folder, disk, broken, capsys, to):
    out = disk / "weights"
    if to != "huggingface":
        out.write_bytes(b"of before")
    check(disk, broken, capsys, ["export", str(run_folder), "--to", to, "--out", str(out)])


def test_a_failing_disk_ends_publish_with_one_line(run_folder, disk, broken, capsys):
    check(disk, broken, capsys, ["publish", str(run_folder), "--out", str(disk)])


def test_a_failing_disk_ends_a_report_with_one_line(run_folder, disk, broken, capsys):
    out = disk / "report.html"
    out.write_text("of before")
    check(disk, broken, capsys, ["report", str(run_folder), "--points", "0", "--out", str(out)])


def test_a_failing_disk_ends_a_conversion_with_one_line(disk, broken, capsys, tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    (tmp_path / "images/a").mkdir(parents=True)
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / f"images/a/{i}.jpg")
    out = disk / "new.beton"
    check(disk, broken, capsys, ["convert", "imagefolder", str(tmp_path / "images"), str(out), "--workers", "1"])


def test_a_failing_disk_ends_a_feature_cache_with_one_line(disk, broken, beton):
    torch.manual_seed(0)
    extractor = Extractor(
        backbones.build(Backbone("resnet10", stem="cifar", width=8)), views.center(16, 18)[0], ("last",), "fp32"
    )
    loader = Loader(beton, 16, Sampler.sequential(), device="cpu", workers=1)
    reason = broken()
    with pytest.raises(ValueError, match="give --cache DIR elsewhere, or --no-cache") as error:
        cache.load_or_extract(disk / "cache", extractor, loader)
    assert str(disk) in str(error.value) and (reason in str(error.value) or "GiB free" in str(error.value))
    assert not files_of(disk)


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_a_failing_disk_ends_a_run_with_one_line(disk, how):
    """The run ends and names the newest complete checkpoint, which is still there and from which it goes on."""
    run = cases.run("moco", steps=6, norm=False)
    run.name, run.log.root, run.log.collapse_every, run.log.checkpoint_steps = how, str(disk), 0, 2
    checkpoints = disk / how / "checkpoints"

    class Break:
        def before_epoch(self, t):
            pass

        after_epoch = before_epoch

        def after_step(self, t, out, batch):
            while t.step == 3 and not (checkpoints / "step_00000002").exists():
                time.sleep(0.01)  # it is written in the background
            if t.step == 3 and how == "full":
                fill(disk / "filler")
            elif t.step == 3:  # the log's files are open: only a mount of its own can become read-only
                subprocess.run(["mount", "--bind", checkpoints, checkpoints], check=True)
                subprocess.run(["mount", "-o", "remount,ro,bind", checkpoints], check=True)

    dist.init("cpu")
    try:
        with pytest.raises((ValueError, OSError)) as error:
            engine.fit(run, hooks=[Break()], device="cpu", loader=cases.loader(run))
    finally:
        if how == "full":
            (disk / "filler").unlink()
        else:
            subprocess.run(["umount", checkpoints], check=True)
    reason = os.strerror(errno.ENOSPC if how == "full" else errno.EROFS)
    assert reason in str(error.value) and str(checkpoints) in str(error.value)
    assert [p.name for p in checkpoints.iterdir() if p.suffix != ".tmp"] == ["step_00000002"]
    t = engine.fit(run, hooks=[], resume=True, device="cpu", loader=cases.loader(run))
    assert t.step == 6 and f"continuing {checkpoints}/step_00000002" in (disk / how / "log.txt").read_text()
    dist.shutdown()
