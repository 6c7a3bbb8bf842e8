"""What the watchdog says of ranks that are silent, lost or late, by the signs of life in a store; without processes."""

import json
import threading
import time

import pytest
import torch.distributed as td

from fastssl import dist
from fastssl.ending import watchdog
from fastssl.ending.watchdog import Progress, Watchdog


def beat(step: int, count: int = 1, place: str = "loader.py:9 (epoch)", waits: bool = False) -> str:
    return json.dumps({"beat": count, "step": step, "place": place, "waits": waits, "host": "node3"})


class Gone:
    """A store whose host has ended."""

    def check(self, keys):
        raise RuntimeError("Connection reset by peer")


@pytest.fixture
def watch(monkeypatch):
    """The watchdog of rank 0 of four, without its thread; `now` can be moved."""
    monkeypatch.setattr(dist, "world", lambda: 4)
    monkeypatch.setattr(dist, "rank", lambda: 0)
    monkeypatch.setattr(watchdog, "progress", Progress())
    monkeypatch.setattr(threading.Thread, "start", lambda self: None)
    made = Watchdog()
    made._store = td.HashStore()
    return made


def write(watch, **ranks):
    for name, value in ranks.items():
        watch._store.set(f"fastssl/beat/{name[1:]}", value)


def test_a_silent_rank_is_lost(watch, monkeypatch):
    start = time.monotonic()
    write(watch, r1=beat(7), r2=beat(7), r3=beat(7))
    assert watch._look() is None
    monkeypatch.setattr(time, "monotonic", lambda: start + watchdog.SILENT_S - 5)
    write(watch, r1=beat(8, 2), r3=beat(8, 2))
    assert watch._look() is None
    monkeypatch.setattr(time, "monotonic", lambda: start + watchdog.SILENT_S + 5)
    reason = watch._look()
    assert reason.startswith("rank 2 is lost on node3 after step 7: no sign of life for 120 s; it was killed")


def test_the_rank_that_the_others_wait_for_is_late(watch, monkeypatch):
    waiting = beat(7, place="dist.py:8 (sum_)", waits=True)
    write(watch, r1=waiting, r2=beat(7), r3=waiting)
    monkeypatch.setattr(watchdog, "_place", lambda: ("dist.py:8 (sum_)", True))
    with watchdog.progress.watched(0.0):
        watchdog.progress.made(7)
        assert watch._look() is None  # without a limit
    watch._written = 0.0
    with watchdog.progress.watched(1e-9):
        reason = watch._look()
    assert reason == (
        "no step in 0 s (timeout_s): rank 2 on node3 hangs after step 7 in loader.py:9 (epoch); rank 0 waits for it in "
        "dist.py:8 (sum_); continue with --resume"
    )


def test_nothing_is_late_outside_training(watch):
    with watchdog.progress.watched(1e-9):
        assert watchdog.progress.idle() > 0
    assert watchdog.progress.idle() == 0 and watch._look() is None


@pytest.mark.parametrize("error", ["[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.1]:5", "NCCL"])
def test_the_rank_without_a_new_sign_of_life_is_lost(watch, monkeypatch, error):
    write(watch, r0=beat(7), r1=beat(7), r2=beat(6), r3=beat(7))

    def wait(seconds):
        write(watch, r1=beat(7, 2), r3=beat(7, 2))

    monkeypatch.setattr(time, "sleep", wait)
    assert watch.lost(RuntimeError(error)).startswith("rank 2 is lost on node3 after step 6: it has ended without an")
    watch._store = Gone()
    assert watch.lost(RuntimeError(error)).startswith("rank 0 is lost: it has ended without an error; it was killed")
    assert watch.lost(RuntimeError("shapes do not agree")) is None


def test_the_place_is_the_innermost_line_of_our_code():
    place, waits = watchdog._place()
    assert place.endswith("(_place)") and not waits
