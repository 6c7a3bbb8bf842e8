"""The bottleneck that a run reports with the setting that would help, and the settings that were chosen for it."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bare_trainer import bare_trainer

sys.path.insert(0, str(Path(__file__).parent / "methods"))
import method_cases as cases

from fastssl import bottleneck, dist, engine
from fastssl.config import Optim, Run, Speed
from fastssl.cuda_graph import CapturableStep
from fastssl.files.datacard import DataCard
from fastssl.hooks import LinearProbe
from fastssl.sampler import Sampler

RECORD = {
    "data_ms": 0.0,
    "views_ms": 1.0,
    "forward_ms": 3.0,
    "backward_ms": 5.0,
    "optimizer_ms": 1.0,
    "step_ms": 0.0,
    "other_ms": 0.0,
}


def records(n, **changes):
    record = RECORD | changes
    return [record | {"total_ms": sum(record.values()), "step": i} for i in range(n)]


def trainer(device="cuda", *, pixels=1024, workers=64, **speed):
    loader = SimpleNamespace(
        card=DataCard(samples=1000, bytes=0, max_pixels=pixels), samples=1000, workers=workers, sampler=Sampler()
    )
    run = Run(method=None, speed=Speed(**speed), optim=Optim(batch=64, precision="fp16"))
    reason = None if run.speed.compile == "on" else "not compared yet; speed.compile=on compiles it"
    step = CapturableStep(None, reason=None)
    return bare_trainer(run, loader, device=torch.device(device), capturable_step=step, not_compiled=reason)


def summary(t, **changes):
    times = bottleneck.StepTimes()
    times.add(t, records(40, **changes))
    return times.summary(t)


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    monkeypatch.setattr(bottleneck, "free_memory", lambda device: 2**30)
    monkeypatch.setattr(bottleneck, "cores", lambda: 8)


def test_the_bottleneck_names_the_setting_that_helps():
    assert "forward 30 %, backward 50 %" in summary(trainer())
    assert "try speed.graph=on" in summary(trainer())
    replayed = {"views_ms": 0.0, "forward_ms": 0.0, "backward_ms": 0.0, "optimizer_ms": 0.0, "step_ms": 10.0}
    assert "try speed.compile=on" in summary(trainer(graph="on"), **replayed)
    assert "no setting of speed is left" in summary(trainer(graph="on", compile="on"), **replayed)
    assert "between steps" in summary(trainer(), other_ms=2.0)
    assert "a GPU or a smaller network" in summary(trainer("cpu"))
    assert "augmentation: try speed.kernels=auto" in summary(trainer(kernels="reference"), views_ms=20.0)


def test_slow_loading_names_the_setting_that_fits():
    slow = {"data_ms": 5.0}
    assert "bottleneck is loading: speed.resident=True" in summary(trainer(), **slow)
    large = 10**6  # 3 GB decoded, 0.5 GiB allowed
    assert "speed.workers=8" in summary(trainer(pixels=large, workers=2), **slow)
    assert "--short-side" in summary(trainer(pixels=large), **slow)
    assert "speed.resident" not in summary(trainer(resident=True), **slow)


def test_waiting_for_data_is_reported_once():
    times, t = bottleneck.StepTimes(), trainer()
    texts = [times.add(t, records(10, data_ms=1.0)) for _ in range(9)]
    assert [i for i, text in enumerate(texts) if text] == [5]  # 10 steps that do not count, then 50
    assert "wait for data 9 % of the time: speed.resident=True" in texts[5]
    fast = bottleneck.StepTimes()
    fast.add(t, records(bottleneck.SKIPPED_STEPS, data_ms=1e6))  # the first batches are slow everywhere
    assert not any(fast.add(t, records(10, data_ms=0.5)) for _ in range(9))


def test_a_short_run_has_no_bottleneck():
    times = bottleneck.StepTimes()
    times.add(trainer(), records(bottleneck.SKIPPED_STEPS + 5))
    assert times.summary(trainer()) is None


def test_automatic_settings_are_given_with_their_reason():
    texts = bottleneck.automatic_settings(trainer())
    for part in (
        "workers=64 (the cores",
        "kernels=triton (a CUDA device)",
        "graph=on (",
        "compile=off (not compared",
        "micro_batch=64 (all images of a rank)",
    ):
        assert part in texts
    assert (
        bottleneck.automatic_settings(
            trainer(workers=1, kernels="reference", graph="off", compile="off", micro_batch=8)
        ).count("=")
        == 1
    )
    t = trainer()
    assert "graph=on (the same bits in less time)\n" in bottleneck.automatic_settings(t)
    t.hooks = [LinearProbe()]
    assert "less time; monitors follow it, speed.graph=on captures the probe" in bottleneck.automatic_settings(t)
    t = trainer("cpu")
    t.capturable_step = CapturableStep(None, reason="it needs a CUDA device")
    chosen = bottleneck.automatic_settings(t)
    assert "kernels=reference (no CUDA device)\n  graph=off (it needs a CUDA device)" in chosen
    t.not_compiled = None
    assert "compile=on (" in bottleneck.automatic_settings(t)


def test_a_run_reports_its_bottleneck_and_automatic_settings(tmp_path, capsys):
    dist.init()
    run = cases.run("supervised", steps=22)
    run.log.root, run.optim.epochs, run.speed.workers = str(tmp_path), 6, None
    engine.fit(run, hooks=[], loader=cases.loader(run))
    out = capsys.readouterr().out
    assert "speed, chosen automatically:\n  kernels=reference" in out
    assert out.count("time of a step: ") == 1 and "the bottleneck is" in out
