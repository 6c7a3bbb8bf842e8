"""How a conversion ends early (bad images, a full disk, kill -9), and what it prints."""

import contextlib
import errno
import os
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from convert_tools import (
    Stock,
    convert,
    folder,
    mixed_fixture,  # noqa: F401
)

from fastssl import data_prep
from fastssl.data_prep import write
from fastssl.data_prep.kinds import KINDS


def test_bad_images_stop_the_conversion_with_a_complete_list(tmp_path, capsys):
    root = folder(tmp_path / "in", 4)
    whole = (root / "cat" / "1.jpg").read_bytes()
    (root / "cat" / "1.jpg").write_bytes(whole[:-60])
    (root / "dog" / "2.jpg").write_bytes(b"")
    (root / "dog" / "3.jpg").write_text("<html>404</html>")
    out = tmp_path / "o.beton"
    assert convert("imagefolder", root, out) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "3 of 8 images cannot be read" in error and "--max-bad 3" in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "o.bad.txt"]
    listed = [line.split("\t")[0] for line in (tmp_path / "o.bad.txt").read_text().splitlines()]
    assert listed == ["cat/1.jpg", "dog/2.jpg", "dog/3.jpg"]
    assert convert("imagefolder", root, out, "--max-bad", 2) == 2 and not out.exists()
    assert convert("imagefolder", root, out, "--max-bad", 3) == 0
    assert "left out 3 images that cannot be read" in capsys.readouterr().out
    stock = Stock(out)
    assert stock.card["samples"] == 5 and stock.card["bad"] == 3 and len((tmp_path / "o.bad.txt").read_text()) > 0
    assert stock.table["label"].tolist() == [0, 0, 0, 1, 1] and stock.table["index"].tolist() == [0, 1, 2, 3, 4]
    (root / "cat" / "1.jpg").write_bytes(whole)
    for name in ("2.jpg", "3.jpg"):
        (root / "dog" / name).write_bytes(whole)
    assert convert("imagefolder", root, out, "--force") == 0
    assert not (tmp_path / "o.bad.txt").exists()


def test_a_source_without_a_readable_image(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"x")
    assert convert("imagefolder", tmp_path / "in", tmp_path / "o.beton", "--max-bad", 5) == 2
    assert "none of the 1 images" in capsys.readouterr().err and not (tmp_path / "o.beton").exists()


def test_an_existing_target_needs_force(tmp_path, capsys):
    root = folder(tmp_path / "in", 1)
    out = tmp_path / "o.beton"
    out.write_bytes(b"precious")
    assert convert("imagefolder", root, out) == 2
    assert "--force" in capsys.readouterr().err and out.read_bytes() == b"precious"
    assert not (tmp_path / "o.json").exists()
    (root / "cat" / "0.jpg").write_bytes(b"x")
    assert convert("imagefolder", root, out, "--force") == 2 and out.read_bytes() == b"precious"
    assert convert("imagefolder", root, out, "--force", "--max-bad", 1) == 0 and Stock(out).card["samples"] == 1
    assert convert("imagefolder", root, tmp_path / "o.bin") == 2
    assert "must end in .beton" in capsys.readouterr().err


def child(*argv, **options) -> subprocess.Popen:
    command = [sys.executable, "-W", "error::DeprecationWarning", "-m", "fastssl.data_prep", *map(str, argv)]
    return subprocess.Popen(command, text=True, **options)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk(mixed, tmp_path, workers):
    """Simulated by a limit on the size of files: a write fails, and so does the flush after it."""
    out = tmp_path / "new" / "o.beton"
    argv = "imagefolder", mixed, out, "--mode", "raw", "--workers", workers
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (1 << 18, 1 << 18))
    process = child(*argv, stderr=subprocess.PIPE, preexec_fn=limit)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2
    assert error == f"fastssl convert: {out}: File too large; nothing was written\n"
    assert not out.parent.exists()


def test_a_full_disk_leaves_the_old_file_unchanged(mixed, tmp_path, monkeypatch, capsys):
    out = tmp_path / "o.beton"
    assert convert("imagefolder", folder(tmp_path / "in", 1), out) == 0
    before = {p.name: p.read_bytes() for p in tmp_path.glob("o.*")}

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(write.os, "fsync", full)
    assert convert("imagefolder", mixed, out, "--force") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in tmp_path.glob("o.*")} == before


WAITING = """
import sys, time
from pathlib import Path
from fastssl import data_prep
from fastssl.data_prep import encoding

def wait(refs, options):  # in place of store_many
    Path(sys.argv[1]).touch()
    time.sleep(600)

encoding.store_many = wait
data_prep.main(sys.argv[2:])
"""


def children(pid: int) -> set[str]:
    return set(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_conversion_leaves_no_target(mixed, tmp_path, workers):
    """By SIGKILL: the workers end, too, and the next conversion overwrites the temporary file."""
    out, begun = tmp_path / "o.beton", tmp_path / "begun"
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, str(begun), "imagefolder", str(mixed), str(out), "--workers", str(workers)]
    )
    while not begun.exists():
        assert process.poll() is None
        time.sleep(0.02)
    assert data_prep.main(["imagefolder", str(mixed), str(out)]) == 2  # the name is locked while the process runs
    forked = children(process.pid)
    assert len(forked) == (2 if workers == 2 else 0)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists() and (tmp_path / "o.beton.part").exists()
    assert convert("imagefolder", mixed, out) == 0
    assert not (tmp_path / "o.beton.part").exists()
    deadline = time.monotonic() + 60
    while any(WAITING[:40] in command_of(pid) for pid in forked):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.02)


def command_of(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def test_help_names_every_source(capsys):
    assert data_prep.main(["--help"]) == 0
    text = capsys.readouterr().out
    options = ("--short-side", "--max-pixels", "--quality", "--mode", "--max-bad", "--force")
    for word in (*KINDS, *options, "check"):
        assert word in text


def test_progress_without_a_terminal_is_a_line_per_interval(capsys):
    from fastssl.data_prep.cli import progress_bar

    with progress_bar() as progress:
        progress("images", 1, 2)
    assert capsys.readouterr().err == ""
    with progress_bar(interval_s=0) as progress:
        progress("images", 1, 2)
    assert capsys.readouterr().err == "images: 1 of 2, 0 s\n"


def test_progress_on_a_terminal(mixed, tmp_path):
    """A pseudo-terminal shows a bar, whose thread starts after the workers were forked."""
    import pty

    ours, theirs = pty.openpty()
    argv, env = ("imagefolder", mixed, tmp_path / "o.beton", "--workers", 2), {"TERM": "xterm", "COLUMNS": "100"}
    with child(*argv, stderr=theirs, stdout=subprocess.PIPE, env=os.environ | env) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # Linux raises it at the end of a closed terminal
            while block := os.read(ours, 1 << 16):
                shown += block
        out, _ = process.communicate(timeout=60)
    os.close(ours)
    assert process.returncode == 0 and "300 images" in out
    assert b"images" in shown and "300/300" in shown.decode(errors="replace")
