"""Every step has exactly one complete line, also after kills and resumes; a loss that is not finite ends the run."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from fastssl import dist
from fastssl.log import HostScalar, Log, read

TIMING = {
    "data_ms": 1.0,
    "views_ms": 1.0,
    "forward_ms": 2.0,
    "backward_ms": 4.0,
    "optimizer_ms": 1.0,
    "other_ms": 1.0,
    "total_ms": 10.0,
    "images_per_s": 800.0,
    "memory_gib": 0.5,
    "mfu": None,
}


def timing(step):
    return TIMING | {"step": step}


def make(folder, **options):
    return Log(folder, **{"every": 5, "total_steps": 20, "tensorboard": False, **options})


def run(log, steps, lag=0):
    for step in steps:
        accuracy = torch.tensor(step, dtype=torch.float64)
        scalars = {"lr": 0.1 * step, "loss": torch.tensor(1.0 / step), "accuracy": accuracy}
        log.step(step, step // 10, scalars, [timing(step - lag)] if step > lag else [])


def test_every_step_has_a_line_with_everything(tmp_path):
    log = make(tmp_path)
    run(log, range(1, 21), lag=3)
    log.close([timing(s) for s in (18, 19, 20)])
    records = read(tmp_path)
    assert [r["step"] for r in records] == list(range(1, 21))
    for r in records:
        assert r["loss"] == torch.tensor(1.0 / r["step"]).item()  # the same float32
        assert r["lr"] == 0.1 * r["step"] and r["accuracy"] == r["step"] and r["epoch"] == r["step"] // 10
        assert {k: r[k] for k in TIMING} == TIMING


def test_lines_wait_for_their_timings_until_flush(tmp_path):
    log = make(tmp_path)
    run(log, range(1, 6))
    log.step(6, 0, {"loss": 1.0})
    log.step(7, 0, {"loss": 1.0})
    log.epoch(7, 0, {"knn": 80.0})
    assert [r["step"] for r in read(tmp_path)] == [1, 2, 3, 4, 5]
    log.flush([timing(6)])
    records = read(tmp_path)
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6, 7, 7]
    assert records[5]["total_ms"] == 10.0 and "total_ms" not in records[6]
    assert records[7] == {"step": 7, "epoch": 0, "knn": 80.0}
    log.close()


def test_a_collapse_is_reported_once_at_the_third_measure(tmp_path, capsys):
    log = make(tmp_path)
    for step, rank in enumerate([1.5, 30.0, 1.9, 1.8, 1.7, 1.6, 1.6], 1):
        log.step(step, 0, {"loss": 1.0, "embedding_rank": torch.tensor(rank), "embedding_std": 1.0}, [timing(step)])
    log.close()
    (line,) = [line for line in (tmp_path / "log.txt").read_text().splitlines() if "collapse" in line]
    assert line.startswith("step 5: collapse, the network gives nearly the same for every image: embedding_rank 1.7 (")
    assert line in capsys.readouterr().out


def test_scalars_are_copied_together(tmp_path, monkeypatch):
    """Tensors wait for one copy every few steps: here, one all-reduce of all of them."""
    sizes = []
    monkeypatch.setattr(dist, "sum_", lambda x: sizes.append(x.numel()) or x)
    log = make(tmp_path, every=50, total_steps=40)
    run(log, range(1, 41))
    assert sizes == [2, 18, 20, 20, 20]  # the first step at once, so that its line is seen
    log.close()


def test_a_resumed_run_has_each_step_once(tmp_path):
    log = make(tmp_path)
    run(log, range(1, 13))
    log.epoch(12, 1, {"knn": 1.0})
    log.close()
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('{"step": 13, "lo')  # cut short
    assert [r["step"] for r in read(tmp_path)][-1] == 12
    resumed = make(tmp_path)
    resumed.truncate(7)
    assert [r["step"] for r in read(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]
    run(resumed, range(8, 21))
    resumed.close()
    assert [r["step"] for r in read(tmp_path)] == list(range(1, 21))


def test_a_new_run_starts_a_new_log(tmp_path):
    for _ in range(2):
        log = make(tmp_path, tensorboard=True)
        run(log, range(1, 21))
        log.close()
    assert [r["step"] for r in read(tmp_path)] == list(range(1, 21))
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1


def test_a_kill_leaves_whole_lines(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
import test_log
log = test_log.make({str(tmp_path)!r}, total_steps=10**9, every=10**9)
print("ready", flush=True)
test_log.run(log, range(1, 10**9))
"""
    path = tmp_path / "log.jsonl"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        while not path.exists() or path.stat().st_size < 200_000:
            assert child.poll() is None
        child.send_signal(signal.SIGKILL)
    lines = path.read_text().split("\n")
    assert lines[-1] == ""
    assert [json.loads(line)["step"] for line in lines[:-1]] == list(range(1, len(lines)))


def test_tensorboard_has_the_scalars(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = make(tmp_path, tensorboard=True)
    run(log, range(1, 21))
    log.epoch(20, 1, {"knn": torch.tensor(0.5)})
    log.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert {"loss", "lr", "total_ms", "knn"} <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("loss")] == [5, 10, 15, 20]
    assert events.Scalars("loss")[1].value == pytest.approx(0.1)


def test_printed_lines_have_loss_speed_and_remaining_time(tmp_path, capsys):
    log = make(tmp_path)
    run(log, range(1, 11))
    log.epoch(10, 1, {"knn": 81.25})
    log.text("[bold] is not markup")
    log.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 1/20  epoch 0  loss 1  lr 0.1  accuracy 1  first step in 0.0 s  0.5 GiB"  # no eta from it
    assert lines[1].startswith("step 5/20") and lines[1].endswith("eta 00:00:00")
    assert lines[2] == (
        "step 10/20  epoch 1  loss 0.1  lr 1  accuracy 10  800 images/s  data 10 %  0.5 GiB  eta 00:00:00"
    )
    assert lines[3:] == ["step 10/20  epoch 1  knn 81.25", "[bold] is not markup"]
    assert (tmp_path / "log.txt").read_text().splitlines() == lines


def test_only_rank_0_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dist, "is_main", lambda: False)
    log = make(tmp_path / "run")
    run(log, range(1, 21))
    log.text("hello")
    log.truncate(3)
    log.close()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_step(tmp_path):
    from fastssl.engine import FiniteLossCheck

    log, losses, nan = make(tmp_path), FiniteLossCheck(), torch.tensor(float("nan"))
    losses.check(log.step(1, 0, {"loss": nan}))
    losses.check(log.step(2, 0, {"loss": torch.tensor(1.0)}))  # one bad step is not the end
    log.epoch(2, 0, {"knn": 1.0})  # a line without a loss says nothing of it
    with pytest.raises(ValueError, match="the loss is nan since step 3"):
        for step in range(3, 20):
            losses.check(log.step(step, 0, {"loss": nan}, [timing(step)]))
            log.epoch(step, 0, {"knn": 1.0})
    assert step == 5
    log.close()


def test_steps_skipped_by_fp16_do_not_end_the_run(tmp_path):
    from fastssl.engine import FiniteLossCheck

    log, losses, inf = make(tmp_path), FiniteLossCheck(), torch.tensor(float("inf"))
    for step in range(1, 11):
        losses.check(log.step(step, 0, {"loss": inf, "applied": False, "loss_scale": 2.0**16}, [timing(step)]))
    assert read(tmp_path)[0]["loss"] == "inf"
    with pytest.raises(ValueError, match="since step 11"):
        for step in range(11, 21):
            losses.check(log.step(step, 0, {"loss": inf, "applied": False, "loss_scale": 1.0}, [timing(step)]))
    log.close()


def test_only_scalars_are_logged(tmp_path):
    log = make(tmp_path)
    with pytest.raises(ValueError, match=r"'z' has shape \(2, 3\)"):
        log.step(20, 0, {"z": torch.zeros(2, 3)})
    log.close()


def test_a_host_scalar_is_logged_like_a_number(tmp_path):
    log = Log(tmp_path, every=5, total_steps=2, tensorboard=False)
    log.step(1, 0, {"loss": torch.tensor(1.0), "trace": HostScalar(torch.eye(3), torch.trace)})
    log.step(2, 0, {"loss": torch.tensor(1.0)})
    log.close()
    assert [record.get("trace") for record in read(tmp_path / "log.jsonl")] == [3.0, None]
