"""A loss, gradient or weight that is not finite: the run ends with the step, the samples and the first tensor, and
`fastssl replay` makes the step again; or steps are left out."""

import gc
import json
import math
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "methods"))
import method_cases as cases

from fastssl import amp, dist, engine, hooks, nonfinite
from fastssl.amp import LossScaler
from fastssl.checkpoint import disk, state

STEPS, BAD = 12, 6  # 4 steps an epoch


class Poisoned(torch.nn.Module):
    """Takes the place of a block: its output, or the gradient of it, is not finite for one image (`where`)."""

    def __init__(self, block: torch.nn.Module, where: str):
        super().__init__()
        self.block, self.where, self.row = block, where, None

    def forward(self, x):
        y = self.block(x)
        if self.row is None:
            return y
        weight = y.new_ones(len(y), *(1 for _ in y.shape[1:]))
        weight[self.row] = math.nan
        if self.where == "output":
            return y * weight
        return _GradientTimes.apply(y, weight)


class _GradientTimes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None


def make_run(root: Path, name: str, **changes):
    run = cases.run("simclr", steps=STEPS, norm=False)
    run.backbone = replace(run.backbone)
    run.name, run.log.root, run.log.every = name, str(root), 1
    run.log.checkpoint_steps, run.log.keep, run.log.collapse_every = 4, 1, 0
    for key, value in changes.items():
        section, _, field = key.partition("_")
        setattr(getattr(run, section), field, value)
    return run


@pytest.fixture
def poison(monkeypatch):
    """poison(where, sample, epochs): in these epochs the image of that number is not finite."""
    from fastssl import build as building

    prepare = building.prepare

    def apply(where: str, sample: int, epochs: tuple):
        def poisoned(method, run, device):
            block = Poisoned(method.backbone.layer2, where)
            method.backbone.layer2 = block
            method = prepare(method, run, device)
            forward = method.forward

            def looking(views, batch):
                rows = (batch.index == sample).nonzero().flatten().tolist()
                block.row = rows[0] if rows and batch.epoch in epochs else None
                return forward(views, batch)

            method.forward = looking
            return method

        monkeypatch.setattr(building, "prepare", poisoned)

    yield apply
    dist.shutdown()


def fit(run, device="cpu", **options):
    dist.init(device)
    return engine.fit(run, hooks=[], device=device, loader=cases.loader(run, device), **options)


def step_of(sample: int, epoch: int) -> int:
    """The number of the step (from 1) that trains on a sample."""
    loader = cases.loader(make_run(Path(), "any"))
    return next(epoch * loader.steps + b.step + 1 for b in loader.epoch(epoch) if sample in b.index.tolist())


def seen_in(epoch: int, step: int = 1) -> int:
    """A sample that this epoch trains on in its step `step` (from 0)."""
    return next(b for b in cases.loader(make_run(Path(), "any")).epoch(epoch) if b.step == step).index[3].item()


@pytest.mark.parametrize(
    "where, what, device",
    [
        ("output", "output of backbone.layer2", "cpu"),
        ("gradient", "gradient of ", "cpu"),
        pytest.param("output", "output of backbone.layer2", "cuda", marks=pytest.mark.gpu),
    ],
)
def test_the_run_ends_and_names_the_step_the_sample_and_the_first_tensor(tmp_path, poison, where, what, device):
    sample = seen_in(1)
    assert step_of(sample, 1) == BAD
    poison(where, sample, (1,))
    run = make_run(tmp_path, where, speed_graph="off")  # the poison is Python in the forward
    with pytest.raises(ValueError) as error:
        fit(run, device)
    message = str(error.value)
    assert f"the loss is nan since step {BAD if where == 'output' else BAD + 1} (epoch 1): lower optim.lr" in message
    assert f"the first tensor that is not finite, in step {BAD}: {what}" in message
    folder = tmp_path / where / "nonfinite"
    assert message.endswith(f"; the state before the step and its batch are in {folder}")
    if where == "output":
        assert f", of the samples {sample}; " in message
    assert [p.name for p in (folder / "checkpoints").iterdir()] == [f"step_{BAD - 1:08d}"]
    assert [p.name for p in (tmp_path / where / "checkpoints").iterdir()] == ["step_00000004"]

    dist.init(device)
    t = engine.build_plain(run, device, cases.loader(run, device))
    assert f"in step {BAD}: {what}" in nonfinite.replay(t, engine.batches)


def test_the_trainer_of_a_failed_run_is_freed_before_another_is_built(tmp_path, poison, monkeypatch):
    """Else the device must hold both.  It is in cycles, which Python frees some time later."""
    poison("output", seen_in(1), (1,))
    methods, build, kept = [], engine.build, []

    def recording(*args):
        t = build(*args)
        methods.append(weakref.ref(t.method))
        return t

    monkeypatch.setattr(engine, "build", recording)
    monkeypatch.setattr(engine, "find_nonfinite", lambda *_: kept.append(methods[0]()) or "found")
    gc.disable()
    try:
        with pytest.raises(ValueError, match="; found"):
            fit(make_run(tmp_path, "freed"))
    finally:
        gc.enable()
    assert kept == [None]


def test_a_rerun_that_takes_too_long_names_the_replay_command(tmp_path, poison, monkeypatch):
    monkeypatch.setattr(nonfinite, "RERUN_S", 0.0)
    poison("output", seen_in(1), (1,))
    run = make_run(tmp_path, "late")
    run.log.checkpoint_steps = None
    with pytest.raises(ValueError, match="`fastssl replay` with the same arguments repeats 4 steps"):
        fit(run)
    dist.init("cpu")
    t = engine.build_plain(run, "cpu", cases.loader(run))
    assert f"in step {BAD}: output of backbone.layer2" in nonfinite.replay(t, engine.batches)


def test_a_step_is_made_again_in_the_precision_of_the_run(tmp_path, monkeypatch):
    """On a CPU that would emulate bf16, `fit` has trained in fp32."""
    monkeypatch.setattr(engine, "emulated", lambda precision, device: precision == "bf16")
    run = make_run(tmp_path, "emulated", optim_precision="bf16")
    assert engine.build_plain(run, "cpu", cases.loader(run)).run.optim.precision == "fp32"


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_skipped_steps_change_nothing(tmp_path, poison):
    """Weights, running statistics and those of the probe stay as they are."""
    sample = seen_in(1)
    poison("output", sample, (1,))
    run = make_run(tmp_path, "skip", optim_skip_nonfinite=1, backbone_norm="bn")
    seen, probe = {}, hooks.LinearProbe()

    class Look(hooks.Hook):
        def after_step(self, t, out, batch):
            assert all(v.isfinite().all() for v in out.values() if v.is_floating_point())
            state = t.method.state_dict() | {f"probe.{name}": probe.state[name] for name in ("mean", "variance")}
            seen[t.step] = {k: v.clone() for k, v in state.items()}

    dist.init("cpu")
    engine.fit(run, hooks=[probe, Look()], device="cpu", loader=cases.loader(run))
    applied = {r["step"]: r["applied"] for r in records(tmp_path / "skip") if "loss" in r}
    assert [step for step, done in applied.items() if not done] == [BAD] and len(applied) == STEPS
    assert all(torch.equal(v, seen[BAD - 1][k]) for k, v in seen[BAD].items())
    assert "backbone.layer3.0.bn1.running_mean" in seen[BAD]
    for name in ("backbone.conv1.weight", "probe.mean", "probe.variance"):
        assert not torch.equal(seen[BAD + 1][name], seen[BAD][name])
    assert all(v.isfinite().all() for v in seen[STEPS].values())


def test_a_run_that_ended_continues_without_its_last_step(tmp_path, poison):
    """The step that is left out is no reason to write no checkpoint, which has the number of such steps in a row."""
    poison("output", seen_in(2, step=3), (2,))
    run = make_run(tmp_path, "last")
    with pytest.raises(ValueError, match="no checkpoint of step 12 is written"):
        fit(run)
    run.optim.skip_nonfinite = 1
    fit(run, resume=True)
    path = disk.newest(tmp_path / "last")
    assert path.name == "step_00000012" and state.read(path)["scale"]["bad"] == 1
    scaler = LossScaler("fp32", skip_nonfinite=1)
    scaler.load_state_dict(state.read(path)["scale"])
    scaler.unscale_([torch.full((2,), math.nan)])
    assert scaler.bad_steps == 2


@pytest.mark.parametrize("speed", [{"speed_zero": 0}, {"speed_zero": 1}, {"speed_micro_batch": 2}])
def test_an_overflow_of_fp16_in_the_forward_leaves_no_trace_in_running_statistics(tmp_path, poison, monkeypatch, speed):
    monkeypatch.setattr(amp, "NATIVE", {})  # otherwise a CPU without instructions for fp16 trains in fp32
    poison("output", seen_in(1), (1,))
    t = fit(make_run(tmp_path, "fp16", optim_precision="fp16", backbone_norm="bn", **speed))
    assert [r["step"] for r in records(tmp_path / "fp16") if r.get("applied") is False] == [BAD]
    assert all(v.isfinite().all() for v in t.method.state_dict().values() if v.is_floating_point())


def test_too_many_skipped_steps_in_a_row_end_the_run(tmp_path, poison):
    poison("gradient", seen_in(1), (1,))
    run = make_run(tmp_path, "all", optim_skip_nonfinite=2, optim_lr=1e30)
    with pytest.raises(ValueError, match=r"since step \d+ .*; the first tensor that is not finite, in step \d+: "):
        fit(run)
    assert not (tmp_path / "all/checkpoints/step_00000012").exists()


def test_skip_nonfinite_is_refused_with_zero(tmp_path):
    run = make_run(tmp_path, "zero", optim_skip_nonfinite=1, speed_zero=1)
    with pytest.raises(ValueError, match="optim.skip_nonfinite=1 is not possible with speed.zero=1"):
        fit(run)


def test_a_loss_scale_of_1_that_still_overflows_ends_the_run():
    losses = nonfinite.FiniteLossCheck()
    losses.check([{"step": s, "epoch": 0, "loss": 2.0, "applied": False, "loss_scale": 4.0} for s in range(1, 20)])
    last = [{"step": s, "epoch": 1, "loss": 2.0, "applied": False, "loss_scale": 1.0} for s in range(20, 22)]
    losses.check(last)
    with pytest.raises(
        ValueError, match="gradients are not finite, with a loss scale of 1, since step 20 .*bf16"
    ) as error:
        losses.check([{**last[0], "step": 22}])
    assert error.value.step == 20


def test_the_replay_command_repeats_the_saved_step_and_raises_without_one(tmp_path, monkeypatch, capsys):
    from fastssl import config, replay

    (tmp_path / "c.py").write_text("")
    run = make_run(tmp_path, "none")
    monkeypatch.setattr(config, "load", lambda *_: run)
    monkeypatch.setattr(engine, "build_plain", lambda run, device: engine.build(run, (), device, cases.loader(run)))
    assert replay.main([str(tmp_path / "c.py"), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "holds no step: it is saved when a run ends because of a loss" in error
