"""--restarts: what is started again, with which arguments, and what is not."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from bare_trainer import bare_trainer

from fastssl import train
from fastssl.checkpoint import disk
from fastssl.checkpoint.writer import Writer
from fastssl.ending import restarts, supervise

LIFE = """
import os, pathlib, signal, sys, time
life, ends = os.environ["FASTSSL_RESTARTS"], sys.argv[1].split(",")
what, _, end = ends[int(life)].rpartition(" ")
end = int(end)
with open("lives", "a") as file:
    print(life, os.environ["MASTER_PORT"], *sys.argv[2:], file=file)
if "saved" in what:
    pathlib.Path(os.environ["FASTSSL_SAVED"]).touch()
if "handled" in what:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
if "ignored" in what:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "stop" in what:
    os.kill(os.getppid(), signal.SIGTERM)
if "waits" in what:
    pathlib.Path("ready").touch()
    time.sleep(60)
if end < 0:
    os.kill(os.getpid(), -end)
sys.exit(end)
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """run(ends, restarts) -> (exit code, lines of the lives, lines printed)"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(restarts, "PAUSE_S", 0.1)
    (tmp_path / "life.py").write_text(LIFE)

    def start(ends: str, restarts: int, *args: str):
        code = supervise([sys.executable, "life.py", ends, *(args or ("--force",))], restarts)
        return code, (tmp_path / "lives").read_text().splitlines(), capfd.readouterr().err.splitlines()

    return start


def test_a_crashed_run_is_restarted_and_continues(run):
    code, lives, lines = run("saved -9,1,0", 3)
    assert code == 0 and lives == ["0 29500 --force", "1 29600 --continue", "2 29700 --continue"]
    assert lines == [
        "fastssl: rank 0 was ended by SIGKILL; restart 1 of 3",
        "fastssl: rank 0 ended with exit code 1; restart 2 of 3",
    ]


@pytest.mark.parametrize("given", ["--force", "--resume-from a/b x=1", "--resume-from=a/b"])
def test_before_the_first_checkpoint_a_restart_repeats_the_command(run, given):
    """Else --continue would take up the run that --force discards."""
    _, lives, _ = run("1,saved 1,0", 2, *given.split(), "y=2")
    assert [life.split()[2:] for life in lives[:2]] == [[*given.split(), "y=2"]] * 2
    assert lives[2].split()[2:] == [*given.replace("--force", "").split(), "y=2", "--continue"]


def test_a_slurm_job_and_its_restarts_share_the_file_that_tells_of_a_checkpoint(run, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSSL_SAVED", str(tmp_path / "slurm-7.saved"))
    _, lives, _ = run("1,saved 1,0", 2)
    assert [life.split()[2] for life in lives] == ["--force", "--force", "--continue"]
    assert (tmp_path / "slurm-7.saved").exists()


def test_rank_0_marks_a_checkpoint_before_it_is_complete(tmp_path, monkeypatch):
    """Else a job that ends in between would be started again with --force, which deletes the checkpoint."""
    monkeypatch.setenv("FASTSSL_SAVED", str(tmp_path / "saved"))
    writer = Writer(bare_trainer(None, SimpleNamespace(steps=1), folder=tmp_path))
    with pytest.raises(ValueError, match="no space"):
        writer._commit(disk.create(tmp_path, 1), [{"error": "no space"}])
    assert not (tmp_path / "saved").exists()
    rename = Path.rename

    def marked_before(path, to):
        assert (tmp_path / "saved").exists()
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", marked_before)
    assert writer._commit(disk.create(tmp_path, 1), [{"files": {}}]).exists()


def test_each_start_has_its_own_port_that_exists():
    assert [restarts._port(29500, n) for n in range(3)] == [29500, 29600, 29700]
    assert restarts._port(65500, 2) == 65300


def test_a_run_is_restarted_at_most_n_times(run):
    code, lives, _ = run("-9,-9,-9", 1)
    assert code == 128 + 9 and len(lives) == 2


@pytest.mark.parametrize("code", [2, 75, 130])
def test_errors_that_a_restart_cannot_fix_end_the_run(run, code):
    assert run(str(code), 3)[:2] == (code, ["0 29500 --force"])


def test_signals_go_to_the_child(run, tmp_path):
    def send():
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send).start()
    assert run("handled waits 0", 3)[0] == 75


@pytest.mark.parametrize("how", ["stop waits 0", "ignored stop 1", "ignored stop -9"])
def test_a_run_is_not_restarted_after_a_signal(run, how):
    """Also where the child has not handled it: before its first step, or as it failed for another reason."""
    code, lives, lines = run(how + ",0", 3)
    assert (code, lives, lines) == (75, ["0 29500 --force"], [])


def test_a_signal_before_the_child_starts_is_passed_on(run, monkeypatch):
    start = subprocess.Popen

    def late(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return start(*args, **kwargs)

    monkeypatch.setattr(subprocess, "Popen", late)
    begun = time.monotonic()
    assert supervise([sys.executable, "-c", "import time; time.sleep(60)"], 3) == 75
    assert time.monotonic() - begun < 30


def test_a_signal_between_two_starts_ends_the_run(run, monkeypatch):
    monkeypatch.setattr(restarts, "_announce", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert run("1,0", 3)[:2] == (75, ["0 29500 --force"])


def test_a_signal_that_is_ignored_stays_ignored(run, monkeypatch):
    """Under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        command = "import signal; raise SystemExit(signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN)"
        assert supervise([sys.executable, "-c", command], 0) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("launcher, code", [("CROSS_RANK", 75), ("NO_LAUNCHER", 0)])
def test_the_child_is_stopped_when_the_launcher_has_gone(launcher, code, monkeypatch):
    """And not when the shell has gone that started it."""
    for name in restarts.LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(launcher, "1")
    parents = iter([1000])
    monkeypatch.setattr(os, "getppid", lambda: next(parents, 1))
    assert supervise([sys.executable, "-c", "import time; time.sleep(2.5)"], 3) == code


def test_the_child_gets_the_arguments_without_restarts():
    given = ["c.py", "--restarts", "2", "a.b=1", "--restarts=3", "--resume"]
    assert train._without_restarts(given) == ["c.py", "a.b=1", "--resume"]


def test_a_restart_may_name_the_checkpoint_to_start_from(capsys):
    args = train.parse(["c.py", "--resume-from", "a", "--continue"])
    assert vars(args)["continue"] and args.resume_from == "a"
    assert train.main(["--resume", "--resume-from", "a"]) == 2
    assert "--resume and --resume-from: give one of them" in capsys.readouterr().err


def test_a_negative_number_of_restarts_is_refused(capsys):
    assert train.main(["--restarts", "-1"]) == 2
    assert "--restarts -1: must be 0 or more" in capsys.readouterr().err
