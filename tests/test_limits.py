"""What a run says of its speed: the limit, the switch, the warning, the settings that were chosen for it."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "methods"))
import method_cases as cases

from fastssl import dist, engine, limits

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
    speed = {
        "resident": False,
        "workers": None,
        "kernels": "auto",
        "graph": "auto",
        "compile": False,
        "zero": 0,
        "micro_batch": None,
    } | speed
    loader = SimpleNamespace(card={"max_pixels": pixels}, samples=1000, workers=workers, micro=1)
    run = SimpleNamespace(speed=SimpleNamespace(**speed), optim=SimpleNamespace(batch=64, precision="fp16"))
    return SimpleNamespace(run=run, loader=loader, device=torch.device(device), graphed=SimpleNamespace(reason=None))


def summary(t, **changes):
    spent = limits.Limits()
    spent.add(t, records(40, **changes))
    return spent.summary(t)


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    monkeypatch.setattr(limits, "free_memory", lambda device: 2**30)
    monkeypatch.setattr(limits, "cores", lambda: 8)


def test_the_largest_limit_names_its_switch():
    assert "forward 30 %, backward 50 %" in summary(trainer())
    assert "try speed.graph=on" in summary(trainer())
    replayed = {"views_ms": 0.0, "forward_ms": 0.0, "backward_ms": 0.0, "optimizer_ms": 0.0, "step_ms": 10.0}
    assert "try speed.compile=True" in summary(trainer(graph="on"), **replayed)
    assert "no switch of speed is left" in summary(trainer(graph="on", compile=True), **replayed)
    assert "between steps" in summary(trainer(), other_ms=2.0)
    assert "a GPU or a smaller network" in summary(trainer("cpu"))
    assert "making views: try speed.kernels=auto" in summary(trainer(kernels="reference"), views_ms=20.0)


def test_loading_names_what_fits():
    slow = {"data_ms": 5.0}
    assert "limit is loading: speed.resident=True" in summary(trainer(), **slow)
    large = 10**6  # 3 GB decoded, 0.5 GiB allowed
    assert "speed.workers=8" in summary(trainer(pixels=large, workers=2), **slow)
    assert "--short-side" in summary(trainer(pixels=large), **slow)
    assert "speed.resident" not in summary(trainer(resident=True), **slow)


def test_waiting_for_data_is_said_once():
    spent, t = limits.Limits(), trainer()
    said = [spent.add(t, records(10, data_ms=1.0)) for _ in range(9)]
    assert [i for i, text in enumerate(said) if text] == [5]  # 10 steps that do not count, then 50
    assert "wait for data 9 % of the time: speed.resident=True" in said[5]
    calm = limits.Limits()
    calm.add(t, records(limits.SKIPPED, data_ms=1e6))  # the first batches are slow everywhere
    assert not any(calm.add(t, records(10, data_ms=0.5)) for _ in range(9))


def test_a_short_run_has_no_limit():
    spent = limits.Limits()
    spent.add(trainer(), records(limits.SKIPPED + 5))
    assert spent.summary(trainer()) is None


def test_chosen_settings_have_their_reason():
    said = limits.chosen(trainer())
    for part in ("workers=64 (the cores", "kernels=triton (a CUDA device)", "graph=on (", "micro_batch=64 (a rank's"):
        assert part in said
    assert limits.chosen(trainer(workers=1, kernels="reference", graph="off", micro_batch=8)).count("=") == 1
    t = trainer("cpu")
    t.graphed = SimpleNamespace(reason="it needs a CUDA device")
    assert "kernels=reference (no CUDA device), graph=off (it needs a CUDA device)" in limits.chosen(t)


def test_a_run_says_so(tmp_path, capsys):
    dist.init()
    run = cases.run("supervised", steps=22)
    run.log.root, run.optim.epochs, run.speed.workers = str(tmp_path), 6, None
    engine.fit(run, hooks=[], loader=cases.loader(run))
    out = capsys.readouterr().out
    assert "speed, as chosen: kernels=reference" in out
    assert out.count("time of a step: ") == 1 and "the limit is" in out
