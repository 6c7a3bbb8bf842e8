"""Phases add up to the step, FLOPs are those of forward and backward, CUDA events are read only when they are due."""

import pytest
import torch
from torch import nn

from fastssl import meters
from fastssl.meters import Meter


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when a test says so."""
    now = [0.0]
    monkeypatch.setattr(meters.time, "perf_counter", lambda: now[0])
    return lambda ms: now.__setitem__(0, now[0] + ms / 1e3)


def test_phases_add_up_to_the_step(clock):
    meter = Meter(torch.device("cpu"), batch=50)
    for name, ms in (("data", 20), ("forward", 10), ("forward", 5)):  # micro-batches come back to a phase
        with meter.phase(name):
            clock(ms)
        clock(1)
    (first,) = meter.end_step(1)
    clock(30)  # a checkpoint between two steps
    with meter.phase("backward"):
        clock(20)
    (second,) = meter.end_step(2)
    spent = [
        [round(record[f"{name}_ms"], 6) for name in (*meters.PHASES, "other", "total")] for record in (first, second)
    ]
    assert spent == [[20, 0, 15, 0, 0, 0, 3, 38], [0, 0, 0, 20, 0, 0, 30, 50]]
    assert (first["step"], second["step"]) == (1, 2)
    assert second["images_per_s"] == pytest.approx(1000)
    assert second["mfu"] is None
    assert 0.01 < second["memory_gib"] < 64


class Event:
    """A CUDA event on a device that finishes `lag` events late."""

    clock, done, recorded, waits, made = 0, 0, 0, 0, 0

    def __init__(self, enable_timing):
        assert enable_timing
        Event.made += 1

    def record(self):
        Event.clock += 1
        self.at = Event.clock

    def query(self):
        return self.at <= Event.done

    def synchronize(self):
        Event.waits += 1
        Event.done = max(Event.done, self.at)

    def elapsed_time(self, later):
        assert later.query(), "read before the device was there: this stalls"
        return float(later.at - self.at)


@pytest.fixture
def events(monkeypatch):
    for name in ("clock", "done", "waits", "made"):
        setattr(Event, name, 0)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    return Event


def test_events_are_read_late_in_order_and_used_again(events):
    meter, records = Meter(torch.device("cuda", 0), batch=8), []
    for step in range(1, 101):
        for name in ("views", "forward"):
            with meter.phase(name):
                pass
        ready = meter.end_step(step)
        assert all(r["step"] < step for r in ready)
        records += ready
        events.done = events.clock - 7  # the device is more than a step behind
    assert events.waits == 0
    assert len(records) >= 97
    assert events.made < 40  # 500 marks
    records += meter.flush()
    assert events.waits == 1
    assert [r["step"] for r in records] == list(range(1, 101))
    assert records[0]["total_ms"] == 4 and {r["total_ms"] for r in records[1:]} == {5.0}
    assert {r["views_ms"] for r in records} == {1.0}
    assert records[-1]["memory_gib"] == 3.0


def test_flops_are_those_of_forward_and_backward_once(clock):
    torch.manual_seed(0)
    net, teacher = nn.Linear(10, 20, bias=False), nn.Linear(10, 20, bias=False)
    meter = Meter(torch.device("cpu"), batch=4, peak=1e9)
    with meters.Flops() as flops:
        x = torch.randn(4, 10)
        with torch.no_grad():
            target = teacher(x)
        (net(x) - target).square().sum().backward()
    forward = 2 * 4 * 10 * 20
    assert flops.total == 3 * forward  # network, teacher, and the gradient of the weights (none of the input)
    meter.flops = flops.total
    with meter.phase("forward"):
        clock(2)
    (record,) = meter.end_step(1)
    assert record["mfu"] == pytest.approx(3 * forward / 2e-3 / 1e9)


def test_flops_of_a_convolutional_network_are_the_published_ones():
    """A ResNet-50 at 224 has 4.09 G multiply-adds; training costs three times that less one input gradient."""
    from torchvision.models import resnet50

    with torch.device("meta"):
        net, x = resnet50(), torch.empty(1, 3, 224, 224)
    with meters.Flops() as flops:
        net(x).sum().backward()
    assert flops.total / 2 == pytest.approx(3 * 4.09e9 - 0.118e9, rel=0.01)


def test_peaks_are_found_by_the_device_name():
    assert meters.peak_flops("NVIDIA H200", "bf16") == 989e12
    assert meters.peak_flops("NVIDIA H100 PCIe", "fp16") == 756e12
    assert meters.peak_flops("NVIDIA H100 80GB HBM3", "fp32") == 494.5e12
    assert meters.peak_flops("NVIDIA A100-SXM4-80GB", "bf16") == 312e12
    assert meters.peak_flops("NVIDIA L40S", "bf16") == 362e12
    assert meters.peak_flops("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16") is None
    assert meters.peak_flops("Some Future Device", "bf16") is None
