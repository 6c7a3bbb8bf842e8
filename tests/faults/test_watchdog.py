"""What the watchdog says of ranks that are silent, lost or late, by their heartbeats in a store; without processes."""

import json
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as td

import fastssl
import fastssl.kernels
from fastssl import dist
from fastssl.ending import Signals, watchdog
from fastssl.ending.watchdog import Progress, Watchdog


def beat(step: int, count: int = 1, location: str = "loader.py:9 (epoch)", waits: bool = False) -> str:
    return json.dumps({"beat": count, "step": step, "location": location, "waits": waits, "host": "node3"})


class Gone:
    """A store whose host has ended."""

    def check(self, keys):
        raise RuntimeError("Connection reset by peer")

    set = check


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
    assert watch._exchange_heartbeats() is None
    monkeypatch.setattr(time, "monotonic", lambda: start + watchdog.SILENT_S - 5)
    write(watch, r1=beat(8, 2), r3=beat(8, 2))
    assert watch._exchange_heartbeats() is None
    monkeypatch.setattr(time, "monotonic", lambda: start + watchdog.SILENT_S + 5)
    reason = watch._exchange_heartbeats()
    assert reason.startswith("rank 2 is lost on node3 after step 7: no heartbeat for 120 s; it was killed")


def test_the_rank_that_the_others_wait_for_is_reported(watch, monkeypatch):
    waiting = beat(7, location="dist.py:8 (sum_)", waits=True)
    write(watch, r1=waiting, r2=beat(7), r3=waiting)
    monkeypatch.setattr(watchdog, "_main_thread_location", lambda: ("dist.py:8 (sum_)", True))
    with watchdog.progress.watched(0.0):
        watchdog.progress.made(7)
        assert watch._exchange_heartbeats() is None  # without a limit
    watch._written = 0.0
    with watchdog.progress.watched(1e-9):
        reason = watch._exchange_heartbeats()
    assert reason == (
        "no step in 0 s (timeout_s): rank 2 on node3 hangs after step 7 in loader.py:9 (epoch); rank 0 waits for it in "
        "dist.py:8 (sum_); continue with --resume"
    )


def test_no_rank_is_reported_outside_training(watch):
    with watchdog.progress.watched(1e-9):
        assert watchdog.progress.idle() > 0
    assert watchdog.progress.idle() == 0 and watch._exchange_heartbeats() is None


@pytest.mark.parametrize("error", ["[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.1]:5", "NCCL"])
def test_the_rank_without_a_new_heartbeat_is_lost(watch, monkeypatch, error):
    write(watch, r0=beat(7), r1=beat(7), r2=beat(6), r3=beat(7))

    def wait(seconds):
        write(watch, r1=beat(7, 2), r3=beat(7, 2))

    monkeypatch.setattr(time, "sleep", wait)
    assert watch.lost(RuntimeError(error)).startswith("rank 2 is lost on node3 after step 6: it has ended without an")
    watch._store = Gone()
    assert watch.lost(RuntimeError(error)).startswith("rank 0 is lost: it has ended without an error; it was killed")
    assert watch.lost(RuntimeError("shapes do not agree")) is None


def test_the_location_is_the_innermost_line_of_our_code():
    location, waits = watchdog._main_thread_location()
    assert location.endswith("(_main_thread_location)") and not waits


def test_rank_0_is_lost_when_its_store_fails_for_long(watch, monkeypatch):
    """NCCL would wait for it without end."""
    monkeypatch.setattr(dist, "rank", lambda: 1)
    start, store = time.monotonic(), watch._store
    write(watch, r0=beat(7))
    assert watch._check() is None
    for seconds, now in ((3, Gone()), (watchdog.STORE_S - 1, Gone()), (watchdog.STORE_S, store)):
        watch._store = now
        monkeypatch.setattr(time, "monotonic", lambda at=start + seconds: at)
        assert watch._check() is None
    watch._store = Gone()
    for seconds, lost in ((watchdog.STORE_S + 3, False), (2 * watchdog.STORE_S + 1, True)):
        monkeypatch.setattr(time, "monotonic", lambda at=start + seconds: at)
        reason = watch._check()
        assert (reason is not None) == lost
    assert reason.startswith(
        "rank 0 is lost on node3 after step 7: the store of the ranks, which it hosts, has failed f"
    )


def test_a_store_that_never_answers_is_lost_too(watch, monkeypatch):
    start, watch._store = time.monotonic(), Gone()
    assert watch._check() is None
    monkeypatch.setattr(time, "monotonic", lambda: start + watchdog.STORE_S + 1)
    assert watch._check().startswith("rank 0 is lost: the store")


PLACE = "def {name}(call):\n    return call()\n"


def called_from(file: Path | str, name: str = "forward") -> tuple[str, bool]:
    """The location where the main thread is, called in a function of `file`, which this function calls."""
    scope = {}
    exec(compile(PLACE.format(name=name), str(file), "exec"), scope)
    return watchdog._location_of(scope[name](lambda: sys._getframe(1)))


@pytest.mark.parametrize("packages", ["lib/python3.11/site-packages", "lib/python3/dist-packages"])
def test_the_location_is_not_in_a_package_of_a_checkout_called_fastssl(packages):
    location, _ = called_from(Path("/home/me/fastssl/.venv") / packages / "torch/nn/modules/module.py")
    assert location.startswith("test_watchdog.py:") and location.endswith(" (called_from)")


@pytest.mark.parametrize("package", [fastssl, fastssl.kernels])
def test_the_location_is_in_the_folders_of_fastssl_wherever_they_are_installed(package, monkeypatch):
    folder = Path(package.__path__[0])
    assert called_from(folder / "x.py") == ("x.py:2 (forward)", False)
    installed = Path(watchdog.STDLIB) / "site-packages/fastssl"
    monkeypatch.setattr(watchdog, "_folders", lambda: (installed,))
    assert called_from(installed / "kernels/x.py") == ("x.py:2 (forward)", False)


def test_only_signals_received_counts_as_waiting(monkeypatch):
    assert called_from("/home/me/mine.py", "received") == ("mine.py:2 (received)", False)
    found = []
    monkeypatch.setattr(dist, "world", lambda: found.append(watchdog._location_of(sys._getframe(1))) or 1)
    Signals("cpu").received()
    assert found[0][0].startswith("signals.py:") and found[0][1]


def test_idle_reads_the_time_once():
    class Ends(Progress):
        """The block ends after the first look at `_time`."""

        def __getattribute__(self, name):
            value = super().__getattribute__(name)
            if name == "_time":
                self._time = None
            return value

    progress = Ends()
    progress._time = 5.0
    assert progress.idle() > 0
