"""--restarts: what is started again, with which arguments, and what is not."""

import os
import signal
import sys
import threading
import time

import pytest

from fastssl import train
from fastssl.ending import supervise

LIFE = """
import os, pathlib, signal, sys, time
life, ends = os.environ["FASTSSL_RESTARTS"], sys.argv[1].split(",")
with open("lives", "a") as file:
    print(life, os.environ["MASTER_PORT"], *sys.argv[2:], file=file)
end = int(ends[int(life)])
if end == 99:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
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
    (tmp_path / "life.py").write_text(LIFE)

    def start(ends: str, restarts: int):
        code = supervise([sys.executable, "life.py", ends, "--force"], restarts)
        return code, (tmp_path / "lives").read_text().splitlines(), capfd.readouterr().err.splitlines()

    return start


def test_crashes_are_started_again_and_continue(run):
    code, lives, lines = run("-9,1,0", 3)
    assert code == 0 and lives == ["0 29500 --force", "1 29501 --continue", "2 29502 --continue"]
    assert lines == [
        "fastssl: rank 0 was ended by SIGKILL; restart 1 of 3",
        "fastssl: rank 0 ended with exit code 1; restart 2 of 3",
    ]


def test_not_more_often_than_given(run):
    code, lives, _ = run("-9,-9,-9", 1)
    assert code == 128 + 9 and len(lives) == 2


@pytest.mark.parametrize("code", [2, 75, 130])
def test_what_a_new_start_cannot_mend_is_not_tried_again(run, code):
    assert run(str(code), 3)[:2] == (code, ["0 29500 --force"])


def test_signals_go_to_the_child(run, tmp_path):
    def send():
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send).start()
    assert run("99", 3)[0] == 75


def test_the_child_gets_the_other_arguments():
    given = ["c.py", "--restarts", "2", "a.b=1", "--restarts=3", "--resume"]
    assert train._without_restarts(given) == ["c.py", "a.b=1", "--resume"]
