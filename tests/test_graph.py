"""The step that may be a CUDA graph is the plain loop to the last bit.

test_counts.py counts that it reads nothing from the device, and test_graph_gpu.py captures it.
"""

import contextlib
import dataclasses
import itertools
import sys
import weakref
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "methods"))
import method_cases as cases
from graph_tools import BATCH, advance, assert_same, build, contents, seeded
from step_modes import Counts, NoCopies, NoReads

from fastssl import cuda_graph, dist, engine, hooks, step
from fastssl.amp import LossScaler
from fastssl.build import not_captured
from fastssl.loader import Batch
from fastssl.sharded_table import ShardedTable


def plain_loop(t, source, steps: int) -> None:
    """The loop as it is told in the papers: numbers on the host, DeepSpeed's backward and step."""
    for _, (batch,) in itertools.islice(source, steps):
        t.schedule.set_lr(t.deepspeed.optimizer, t.step)
        out = t.deepspeed(step.batch_views(t, batch), batch)
        losses = t.method.loss(out, batch)
        t.deepspeed.backward(losses["loss"])
        t.deepspeed.step()
        t.method.after_step({k: v.detach() for k, v in out.items()}, batch, t.step / t.total_steps)
        t.step += 1


@pytest.mark.parametrize("name", [n for n in cases.CASES if n != "deepcluster pic"])
def test_the_pytorch_step_equals_deepspeeds_bit_for_bit(name):
    made = []
    for loop in (plain_loop, advance):
        t = build(name, optim_lr=2.0**-4)
        assert t.capturable_step is not None
        loop(t, seeded(t), 4)
        made.append((contents(t), t.deepspeed.global_steps, t.deepspeed.micro_steps, t.deepspeed.global_samples))
    assert_same(made[0][0], made[1][0])
    assert made[0][1:] == made[1][1:]


def test_gradients_that_a_failed_capture_has_left_do_not_count():
    made = []
    for left in (False, True):
        t = build("supervised")
        for p in t.method.parameters() if left else ():
            p.grad = torch.ones_like(p)
        advance(t, seeded(t), 1)
        made.append(contents(t))
    assert_same(*made)


@pytest.mark.parametrize("name", ["simclr", "byol", "dino", "supervised", "deepcluster", "npid", "vicreg"])
def test_a_step_of_several_micro_batches_does_not_wait_for_the_device(name, monkeypatch):
    """In fp16 neither, where gradients may overflow."""
    t = build(name, optim_precision="fp16", speed_micro_batch=BATCH // 4, settings={"norm": False})
    assert t.capturable_step is not None and "micro-batches" in not_captured(t)
    (_, first), (_, micro_batches) = itertools.islice(engine.batches(t), 2)
    t.step_inputs.write(first[0], t.deepspeed.optimizer.param_groups, 0.5)
    views = {id(b.pixels): step.batch_views(t, b) for b in micro_batches}  # the reference reads
    monkeypatch.setattr(step, "batch_views", lambda t, b: views[id(b.pixels)])
    monkeypatch.setattr(t.step_inputs, "write", lambda *_: None)  # copies, and the host does not wait for it
    t.loss_scaler.value = 4.0
    before = t.method.state_dict()["backbone.conv1.weight"].clone()
    with NoReads(), NoCopies():
        step.step(t, micro_batches)
    assert t.scalars["applied"] and not torch.equal(t.method.state_dict()["backbone.conv1.weight"], before)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.item(),
        bool,
        float,
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.unique(),
        lambda x: torch.tensor([1.0]),
        lambda x: x.new_tensor([1.0]),
    ],
)
def test_a_step_that_waits_for_the_device_is_detected(read):
    x = torch.ones(1)
    with pytest.raises(AssertionError, match="the step"), NoReads(), NoCopies():
        read(x)


KEEP_STATE = [n for n in cases.CASES if not n.startswith(("deepcluster", "odc"))] + ["deepclusterv2"]


@pytest.mark.parametrize("name", KEEP_STATE)
def test_an_overflow_changes_nothing(name):
    """The optimizer's state included, on the device alone; the scale halves."""
    t = build(name, optim_precision="fp16", settings={"norm": False})
    assert t.capturable_step is not None
    source = engine.batches(t)
    t.loss_scaler.value = 4.0
    advance(t, source, 2)
    assert t.scalars["applied"] and t.scalars["loss_scale"] == 4
    before, logged = contents(t), t.scalars["loss_scale"]
    t.loss_scaler.value = 2.0**100
    advance(t, source, 1)
    assert logged == 4, "the log reads it some steps later"
    assert not t.scalars["applied"] and t.loss_scaler.value == 2.0**99 and t.loss_scaler.good_steps == 0
    assert_same(before, contents(t))
    t.loss_scaler.value = 4.0
    advance(t, source, 1)
    assert t.scalars["applied"]
    moved = {k for k, v in contents(t).items() if not torch.equal(v, before[k])}
    kept = {k for k, v in before.items() if k in ("queue", "bank", "memory", "center") and v.numel()}
    assert len(moved) > 10 and kept <= moved


def test_the_scale_doubles_after_good_steps():
    scaler = LossScaler("fp16")
    scaler.good_steps.fill_(scaler.INTERVAL - 2)
    for wanted in (2.0**16, 2.0**17, 2.0**17):
        scaler.unscale_([torch.ones(3)])
        scaler.update_()
        assert scaler.value == wanted
    scaler.value = 1.0
    scaler.unscale_([torch.tensor([1.0, float("nan")])])
    scaler.update_()
    assert (scaler.value, int(scaler.good_steps)) == (1.0, 0)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"speed_graph": "on"}, "CUDA device"),
        ({"speed_graph": "on", "speed_zero": 1}, "ZeRO 1"),
        ({"speed_graph": "on", "speed_micro_batch": 4}, "micro-batches"),
        ({"speed_graph": "off"}, ""),
    ],
)
def test_the_reason_for_no_capture_is_printed(changes, reason, capsys):
    build("simclr", **changes)
    said = capsys.readouterr().out
    assert reason in said and said.count("speed.graph") == bool(reason)


def recorded(hook) -> list:
    """The outputs that its after_step will be given."""
    given, after_step = [], hook.after_step
    hook.after_step = lambda t, out, batch: (given.append(out), after_step(t, out, batch))
    return given


@pytest.mark.parametrize("skip", [0, 2])
def test_a_probe_inside_the_step_is_the_probe_after_it(skip):
    """In every step, also where gradients overflow; with `skip` such a step gives it zeros."""
    made = []
    for graph in ("auto", "on"):
        t = build("simclr", probe=True, speed_graph=graph, optim_precision="fp16", optim_skip_nonfinite=skip)
        source, logged, given = seeded(t), [], recorded(t.hooks[0])
        t.loss_scaler.value = 4.0
        assert step.hooks_in_graph(t) == (t.hooks if graph == "on" else [])
        for _ in range(4):
            advance(t, source, 1, poison=(2,))
            logged.append({name: float(value) for name, value in t.scalars.items()})
        made.append((logged, contents(t)))
        assert [bool(out["features"].any()) for out in given] == [True, True, not skip, True]
    outside, inside = made
    assert outside[0] == inside[0]
    assert {"probe_loss", "probe_top1_train"} < outside[0][0].keys() and not outside[0][2]["applied"]
    assert_same(outside[1], inside[1])


@pytest.mark.parametrize("changes", [{"speed_micro_batch": 4}, {"speed_zero": 1}])
def test_a_probe_follows_a_step_that_cannot_be_captured(changes):
    t = build("simclr", probe=True, speed_graph="on", **changes)
    given = recorded(t.hooks[0])
    advance(t, engine.batches(t), 2)
    assert len(given) == 2 and len(given[0]["features"]) == BATCH and "probe_loss" in t.scalars
    assert step.hooks_in_graph(t) == []


@dataclasses.dataclass
class Count(hooks.Hook):
    total: torch.Tensor
    capturable: bool = False

    def after_step(self, t, out, batch):
        self.total += t.step


def test_equal_hooks_inside_and_outside_the_step_are_each_called_once_and_see_its_number():
    t = build("simclr", speed_graph="on")
    t.hooks = [Count(torch.zeros(2), inside) for inside in (True, True, False, False)]
    advance(t, engine.batches(t), 3)
    assert [hook.total.tolist() for hook in t.hooks] == [[1 + 2 + 3] * 2] * 4


def test_a_hook_inside_the_step_logs_tensors():
    class Half(hooks.Hook):
        capturable = True

        def after_step(self, t, out, batch):
            t.log({"half": 0.5})

    t = build("simclr", speed_graph="on")
    t.hooks = [Half()]
    with pytest.raises(ValueError, match="capturable=True has logged 'half' of type float: it must log 0-dim tensors"):
        advance(t, engine.batches(t), 1)


class Pretended:
    """A CUDA graph on the CPU: a capture changes nothing, a replay runs the step on the captured inputs again."""

    def __init__(self, t):
        self.t = t

    @contextlib.contextmanager
    def capture(self, *_, **__):
        kept, random = contents(self.t), torch.get_rng_state()
        scale = {k: v.clone() for k, v in vars(self.t.loss_scaler).items() if isinstance(v, torch.Tensor)}
        yield
        groups = self.t.deepspeed.optimizer.param_groups
        self.host = [{k: group[k] for k in ("frozen", "weight_decay")} for group in groups]
        torch.set_rng_state(random)
        for name, value in scale.items():
            getattr(self.t.loss_scaler, name).copy_(value)
        self.t.method.load_state_dict({k: kept[k] for k in self.t.method.state_dict()})
        for name, module in self.t.method.named_modules():
            if isinstance(module, ShardedTable):
                module.load_(kept[name])
        for name, p in self.t.method.named_parameters():
            for key, value in self.t.deepspeed.optimizer.state.get(p, {}).items():
                value.copy_(kept[f"{name} {key}"])
        for hook in self.t.hooks:
            hook.load_state_dict({k: kept[f"hook {k}"] for k in hook.state_dict()})

    def replay(self):
        made, groups = self.t.capturable_step._captured, self.t.deepspeed.optimizer.param_groups
        for group, host in zip(groups, self.host):
            group.update(host, lr=float("nan"))  # what the capture has read from the host, and no other number
        out, scalars = self.t.capturable_step.function(made.batch, lambda name: contextlib.nullcontext())
        for name, value in out.items():
            made.out[name].copy_(value)
        made.packed.copy_(torch.stack([v.float().reshape(()) for v in scalars.values() if isinstance(v, torch.Tensor)]))


OPTIONS = {  # some with which the second epoch, of three, needs another graph
    "mae": {"optim_name": "adamw", "optim_weight_decay": 0.1, "optim_weight_decay_end": 0.4},
    "simclr": {"optim_paramwise": {"^projector": {"freeze_epochs": 1}}},
    "dino": {"settings": {"teacher_temperature_end": 0.07, "teacher_epochs": 2}},
    "swav": {"settings": {"freeze_epochs": 1}, "optim_paramwise": {r"^prototypes\.": {"freeze_epochs": 0}}},
    "swav queue": {"settings": {"queue_epoch": 1}},
}


@pytest.mark.parametrize("name", [*OPTIONS, "moco", "byol", "npid", "deepclusterv2"])
def test_replays_take_their_numbers_from_the_device(name, monkeypatch):
    """Over three epochs with moving rates and momentum and two overflows: the same bits as without a graph, although a
    replay sees only what was written to the device before it.  A probe is a part of the graph, and of the replay."""
    made = []
    for captured in (False, True):
        settings = {"optim_precision": "fp16", "optim_lr": 2.0**-4, "optim_schedule": "cosine", **OPTIONS.get(name, {})}
        t = build(name, probe=True, speed_graph="on" if captured else "auto", **settings)
        if captured:
            t.capturable_step.reason, graph = None, Pretended(t)
            monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda graph=graph: graph)
            monkeypatch.setattr(torch.cuda, "graph", graph.capture)
            monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
            monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
            monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.get_rng_state())
        source = seeded(t)
        losses = advance(t, source, 10, poison=(1, 7))
        made.append((losses, {k: float(v) for k, v in t.scalars.items()}, contents(t)))
    assert t.capturable_step._captured is not None
    assert made[0][:2] == made[1][:2] and "probe_loss" in made[0][1]
    assert_same(made[0][2], made[1][2])
    graph.replay = lambda: None
    _, micro_batches = next(source)
    with Counts() as counts:
        step.step(t, micro_batches)
    # copies of a batch's four tensors, of the step's numbers and of the logged ones, and "applied" as a bool
    assert counts.ops <= 7 and counts.reads == []


def test_leaving_the_process_group_deletes_the_graph_first(monkeypatch):
    """NCCL would wait for it, without end."""
    t, order = build("simclr"), []
    t.capturable_step._captured = captured = type("Graph", (), {})()
    weakref.finalize(captured, order.append, "graph")
    del captured
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: order.append("group"))
    monkeypatch.setattr(sys.modules["deepspeed.comm"], "is_initialized", lambda: False)
    dist.shutdown()
    assert order == ["graph", "group"]


@pytest.mark.parametrize("failed", ["nowhere", "here", "on another rank"])
def test_a_capture_that_fails_on_one_of_two_ranks_is_used_on_none(failed, monkeypatch, capsys):
    step = cuda_graph.CapturableStep(None, None)
    part = torch.zeros(4, 1)
    batch = Batch(part, part, part, part, 0, 0)
    monkeypatch.setattr(dist, "world", lambda: 2)
    monkeypatch.setattr(dist, "sum_", lambda count: count + (failed != "on another rank"))

    def capture(key, batch):
        step.reason = "the capture failed: CUDA" if failed == "here" else None
        return None if failed == "here" else type("Captured", (), {"key": key})()

    monkeypatch.setattr(step, "_capture", capture)
    steps = [step.prepare_replay(batch) for _ in range(cuda_graph.WARMUP_STEPS + 2)]
    assert steps == [False] * cuda_graph.WARMUP_STEPS + [failed == "nowhere"] * 2
    reasons = {
        "nowhere": None,
        "here": "the capture failed: CUDA",
        "on another rank": "the capture failed on another rank",
    }
    assert step.reason == reasons[failed]
    assert capsys.readouterr().out.count("is not a CUDA graph: the capture failed") == (failed != "nowhere")
