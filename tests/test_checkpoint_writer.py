"""How the writer of checkpoints waits: for a slow disk, and for ranks that write, are silent or cannot report.  The
test writes what the other rank would into the store of the process group."""

import json
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as td
from bare_trainer import bare_trainer

from fastssl import dist, ending
from fastssl.checkpoint import disk, state, writer
from fastssl.checkpoint.writer import HostCopies, Writer

SLOW_S, LIMIT_S = 1.5, 0.9  # how long a file takes, and how long the run may be without progress


@pytest.fixture
def make(tmp_path, monkeypatch):
    """make(world, rank): the writer of a rank whose checkpoints have one file."""
    for name, value in {"BEAT_S": 0.05, "SILENT_S": 0.6, "STALL_S": 0.3}.items():
        monkeypatch.setattr(writer, name, value)
    monkeypatch.setattr(state, "snapshot", lambda t, copy: {f"rank_{dist.rank()}": b"state"})

    def new(world=1, rank=0):
        monkeypatch.setattr(dist, "world", lambda: world)
        monkeypatch.setattr(dist, "rank", lambda: rank)
        monkeypatch.setattr(dist, "is_main", lambda: rank == 0)
        monkeypatch.setattr(dist, "on_main", lambda function, *args: function(*args))
        monkeypatch.setattr(writer.secrets, "token_hex", lambda n: "token")
        made = Writer(bare_trainer(None, SimpleNamespace(steps=4), folder=tmp_path, step=1))
        made._connection = td.HashStore()
        return made

    return new


@pytest.fixture
def idle(monkeypatch):
    """Writing a file takes SLOW_S; the list of seconds that the run was without progress meanwhile."""
    found, write = [], disk.write

    def slow(path, content):
        end = time.monotonic() + SLOW_S
        while time.monotonic() < end:
            found.append(ending.progress.idle())
            time.sleep(0.01)
        return write(path, content)

    monkeypatch.setattr(disk, "write", slow)
    return found


def fail():
    raise RuntimeError("training fails")


def wait_at_the_end(w, t):
    assert w.finish().name == "step_00000001"


def wait_for_the_one_before(w, t):
    t.step = 2
    w.save()
    w.finish()


@pytest.mark.parametrize("wait", [wait_at_the_end, wait_for_the_one_before, lambda w, t: fail()])
def test_waiting_for_a_slow_disk_counts_as_progress(make, idle, wait):
    made = make()
    try:
        with ending.progress.watched(LIMIT_S), made:
            made.save()
            wait(made, made._t)
    except RuntimeError as error:
        assert str(error) == "training fails"
    assert max(idle) < LIMIT_S and disk.newest(made._t.folder)


def test_waiting_for_a_hanging_thread_does_not_count_as_progress(make, idle, monkeypatch):
    monkeypatch.setattr(writer, "FILE_S", 0.2)
    with ending.progress.watched(LIMIT_S), make() as made:
        made.save()
        made.finish()
    assert max(idle) > LIMIT_S


def test_after_an_error_the_run_does_not_wait_for_a_hanging_thread(make, idle, monkeypatch):
    monkeypatch.setattr(writer, "FILE_S", 0.2)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="training fails"), make() as made:
        made.save()
        thread = made._thread
        fail()
    assert time.monotonic() - start < SLOW_S
    thread.join()


def report(w, beats=0):
    """Rank 1: heartbeats, and then its report."""
    for _ in range(beats):
        time.sleep(0.05)
        w._connection.add("fastssl/checkpoint/token/1/beats", 1)
    entry = disk.write(w._folder / "rank_1", b"state")
    w._connection.set("fastssl/checkpoint/token/1", json.dumps({"files": {"rank_1": entry}}))


def test_rank_0_waits_for_a_rank_that_sends_heartbeats(make):
    with make(world=2) as made:
        made.save()
        other = threading.Thread(target=report, args=(made, 30))  # longer than SILENT_S
        other.start()
        path = made.finish()
        other.join()
    assert disk.damage(path) is None and (path / "rank_1").exists()
    assert made._connection.num_keys() == 0


def test_rank_0_does_not_wait_for_a_silent_rank_nor_return_the_checkpoint_before(make):
    with make(world=2) as made:
        made.save()
        report(made)
        assert made.finish().name == "step_00000001"
        made._t.step = 2
        made.save()
        with pytest.raises(ValueError, match="checkpoints: rank 1 has not written its files; .* is step_00000001"):
            made.finish()
    assert [p.name for p in disk.directory(made._t.folder).iterdir()] == ["step_00000001"]


def test_the_error_of_an_unfinished_checkpoint_is_printed(make, capsys, monkeypatch):
    monkeypatch.setattr(writer, "SILENT_S", 60.0)
    with pytest.raises(RuntimeError, match="training fails"), make(world=2) as made:
        made.save()
        fail()
    assert (
        "checkpoints: rank 1 has not written its files; the newest complete checkpoint is none"
        in capsys.readouterr().err
    )


class Gone:
    """A store whose host has ended."""

    def __getattr__(self, name):
        raise RuntimeError("Connection reset by peer")


def test_a_store_that_fails_ends_the_run_with_its_error(make):
    with make(world=2) as made:
        made.save()
        report(made)
        made.finish()
        made._t.step, made._connection = 2, Gone()
        made.save()
        with pytest.raises(
            ValueError, match="Connection reset by peer; the newest complete checkpoint is step_00000001"
        ):
            made.finish()


def test_another_rank_sends_heartbeats_and_notices_a_store_that_fails(make, idle):
    made = make(world=2, rank=1)
    made.save()
    made._thread.join()
    assert made._connection.add("fastssl/checkpoint/token/1/beats", 0) > 5 and not made.failed
    assert json.loads(made._connection.get("fastssl/checkpoint/token/1"))["files"].keys() == {"rank_1"}
    made._t.step, made._connection = 2, Gone()
    made.save()
    made._thread.join()
    assert made.failed


@pytest.mark.gpu
def test_copies_have_the_values_of_their_step():
    """While the device is busy with it, the next step changes the tensors, and the copies begin late."""
    copies, device = HostCopies(torch.device("cuda")), {"device": "cuda"}
    weights = torch.randn(1 << 20, **device), torch.randn(64, 3, 3, 32, **device).permute(0, 3, 1, 2)
    tensors = *weights, torch.arange(9, **device)[:, None], torch.tensor(3, **device)
    for _ in range(2):  # into new host memory, then into the same again
        before = [x.cpu() for x in tensors]
        torch.cuda._sleep(200_000_000)
        kept = [copies(str(i), x) for i, x in enumerate(tensors)]
        copies.record()
        for x in tensors:
            x.add_(1)
        assert not copies._copied.query(), "the host has waited for the device"
        thread = threading.Thread(target=copies.wait)
        thread.start()
        thread.join()
        assert all(torch.equal(a, b) and a.is_pinned() for a, b in zip(kept, before))
