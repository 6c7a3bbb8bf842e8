"""Groups, schedules, and LARS: against plain translations of its two sources, and under every ZeRO stage."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastssl import optim
from fastssl.config import Optim


class Net(nn.Module):
    """Odd sizes, so that ZeRO has to pad; a zero-initialised matrix, which LARS must move; 1-d norms and biases."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 5, 3)
        self.downsample = nn.Sequential(nn.Conv2d(5, 7, 1, bias=False), nn.GroupNorm(1, 7))
        self.head = nn.Linear(7, 11)
        self.predictor = nn.Linear(11, 3, bias=False)
        self.zero = nn.Linear(3, 1, bias=False)
        nn.init.zeros_(self.zero.weight)

    def forward(self, x):
        y = self.predictor(self.head(self.downsample(self.conv(x).relu()).mean((2, 3))).relu())
        return y + self.zero(y)


def batches(steps=5):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 3, 6, 6, generator=g), torch.randn(8, 3, generator=g)) for _ in range(steps)]


SETTINGS = {
    "lars": Optim(
        name="lars",
        lr=2.0,
        weight_decay=1e-2,
        epochs=1,
        warmup_epochs=0.4,
        paramwise={"ndim<=1": {"weight_decay": 0.0, "lars_exclude": True, "lr_mult": 0.01}},
    ),
    "solo": Optim(
        name="lars",
        lr=0.5,
        weight_decay=1e-2,
        epochs=1,
        eta=0.02,
        clip_lr=True,
        lr_in_momentum=False,
        paramwise={"ndim<=1": {"weight_decay": 0.0, "lars_exclude": True}},
    ),
    "sgd": Optim(
        name="sgd",
        lr=0.1,
        weight_decay=1e-2,
        epochs=1,
        nesterov=True,
        paramwise={"^predictor": {"schedule": "constant", "momentum": 0.5}},
    ),
    "adamw": Optim(
        name="adamw",
        lr=1e-2,
        weight_decay=0.1,
        weight_decay_end=0.2,
        epochs=1,
        paramwise={"ndim<=1": {"weight_decay": 0.0}},
    ),
    "frozen": Optim(
        name="adamw",
        lr=1e-2,
        weight_decay=0.1,
        epochs=1,
        clip=0.1,
        clip_each=True,
        paramwise={"^head": {"freeze_epochs": 0.6}},
    ),
    "sum": Optim(
        name="lars",
        lr=2.0,
        weight_decay=1e-2,
        epochs=1,
        lars_denominator="sum",
        clip=0.1,
        clip_each=True,
        paramwise={"^head": {"freeze_epochs": 0.6}},
    ),
}


def train(settings: Optim) -> dict:
    net = Net()
    optimizer, schedule = optim.build(net.named_parameters(), settings, steps_per_epoch=5)
    for step, (x, y) in enumerate(batches()):
        schedule.set_lr(optimizer, step)
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        optimizer.step()
    return {name: p.detach() for name, p in net.named_parameters()}


def openselfsup(w, g, buf, lr, wd, eta, momentum, dampening, nesterov, exclude):
    """OpenSelfSup's formula, one tensor, with the guards that its successor added."""
    local = 1.0 if exclude or w.norm() == 0 or g.norm() == 0 else eta * w.norm() / (g.norm() + wd * w.norm())
    d = (g + wd * w) * local * lr
    buf = d.clone() if buf is None else momentum * buf + (1 - dampening) * d
    return w - (d + momentum * buf if nesterov else buf), buf


def solo_learn(w, g, buf, lr, wd, eta, momentum, dampening, nesterov, exclude):
    d = g
    if not exclude and w.norm() != 0 and g.norm() != 0:
        local = eta * w.norm() / (g.norm() + w.norm() * wd)
        d = (g + wd * w) * min(local / lr, 1.0)
    buf = d.clone() if buf is None else momentum * buf + (1 - dampening) * d
    return w - lr * (d + momentum * buf if nesterov else buf), buf


@pytest.mark.parametrize("source", [openselfsup, solo_learn])
@pytest.mark.parametrize("dampening, nesterov", [(0.0, False), (0.3, False), (0.0, True)])
@pytest.mark.parametrize("exclude", [False, True])
def test_lars_is_its_source(source, dampening, nesterov, exclude):
    wd, solo = (0.0 if exclude else 0.1), source is solo_learn
    ours = [torch.randn(s, dtype=torch.float64).requires_grad_() for s in ((4, 3), (5,), (2, 2))]
    with torch.no_grad():
        ours[2].zero_()  # OpenSelfSup never moved such a tensor
    lars = optim.Lars(
        ours,
        lr=0.7,
        weight_decay=wd,
        dampening=dampening,
        nesterov=nesterov,
        lars_exclude=exclude,
        eta=0.02 if solo else 1e-3,
        clip_lr=solo,
        lr_in_momentum=not solo,
    )
    plain, buffers = [p.detach().clone() for p in ours], [None] * 3
    for step in range(4):
        for i, p in enumerate(ours):
            p.grad = torch.randn_like(p) * 10.0 ** (i - 3)
            if not solo and (step, i) == (2, 1):
                p.grad.zero_()  # with wd 0 OpenSelfSup divided by zero; solo-learn drops the decay too: not followed
            plain[i], buffers[i] = source(
                plain[i], p.grad, buffers[i], 0.7, wd, lars.defaults["eta"], 0.9, dampening, nesterov, exclude
            )
        lars.step()
    assert plain[2].abs().max() > 0
    for p, q in zip(ours, plain):
        torch.testing.assert_close(p.detach(), q, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("denominator", ["openselfsup", "larc", "sum"])
def test_lars_denominators_are_those_of_their_authors(denominator):
    """Apex's LARC adds 1e-8; SimCLR, BYOL, MoCo v3 and Barlow Twins take the norm of gradient and decay together."""
    wd, eta, lr = 0.1, 1e-3, 0.7
    w = torch.randn(4, 3, dtype=torch.float64).requires_grad_()
    plain, settings = w.detach().clone(), Optim(name="lars", lr=lr, weight_decay=wd, lars_denominator=denominator)
    lars, _ = optim.build([("w", w)], settings, steps_per_epoch=5)
    w.grad = torch.randn_like(w) * 1e-9  # a gradient of pure rounding
    g, decayed = w.grad.clone(), w.grad + wd * plain
    below = {
        "openselfsup": g.norm() + wd * plain.norm(),
        "larc": g.norm() + wd * plain.norm() + 1e-8,
        "sum": decayed.norm(),
    }[denominator]
    lars.step()
    torch.testing.assert_close(w.detach(), plain - lr * eta * plain.norm() / below * decayed, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_frozen_is_the_authors_gradient_of_none(name):
    """Neither decay nor moments nor the step count of Adam run on while a group is frozen."""
    settings = Optim(
        name=name, lr=0.1, weight_decay=0.1, epochs=1, schedule="constant", paramwise={"^head": {"freeze_epochs": 0.6}}
    )
    nets = Net().double(), Net().double()
    ours, schedule = optim.build(nets[0].named_parameters(), settings, steps_per_epoch=5)
    kind, options = (torch.optim.AdamW, {}) if name == "adamw" else (torch.optim.SGD, {"momentum": 0.9})
    theirs = kind(nets[1].parameters(), lr=0.1, weight_decay=0.1, **options)
    assert "frozen for 0.6 epochs" in schedule.table
    for step, (x, y) in enumerate(batches()):
        schedule.set_lr(ours, step)
        for net, optimizer in zip(nets, (ours, theirs)):
            optimizer.zero_grad()
            (net(x.double()) - y).square().mean().backward()
            for p in net.head.parameters():
                if step < 3 and net is nets[1]:
                    p.grad = None
            optimizer.step()
    for a, b in zip(*(net.parameters() for net in nets)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    steps = {int(state["step"]) for state in ours.state.values()} if name == "adamw" else {2, 5}
    assert steps == {2, 5}


def test_clip_each_is_dinos():
    settings = Optim(name="sgd", lr=1.0, momentum=0.0, weight_decay=0.0, epochs=1, clip=0.1, clip_each=True)
    net = Net().double()
    optimizer, _ = optim.build(net.named_parameters(), settings, steps_per_epoch=5)
    (net(batches()[0][0].double()) - batches()[0][1]).square().mean().backward()
    want, clipped = [], 0
    for p in net.parameters():
        factor = 0.1 / (p.grad.norm() + 1e-6)
        clipped += bool(factor < 1)
        want.append(p.detach() - p.grad * min(factor, 1.0))
    assert 0 < clipped < len(want)
    optimizer.step()
    for p, value in zip(net.parameters(), want):
        torch.testing.assert_close(p.detach(), value, rtol=1e-13, atol=1e-15)


def test_lars_never_waits_for_the_device():
    """Reading a value on the host is `_local_scalar_dense`, a synchronisation on CUDA."""

    seen = set()

    class Ops(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    for name in ("lars", "solo"):
        net = Net()
        optimizer, schedule = optim.build(net.named_parameters(), SETTINGS[name], steps_per_epoch=5)
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        with Ops():
            for step in range(2):
                schedule.set_lr(optimizer, step)
                optimizer.step()
        assert "_foreach_norm" in seen
        assert not seen & {"_local_scalar_dense", "is_nonzero", "equal", "_to_copy", "nonzero"}


def test_unused_parameters_stay_where_they_are():
    used, unused = torch.ones(3, 3, requires_grad=True), torch.ones(3, 3, requires_grad=True)
    lars = optim.Lars([used, unused], lr=1.0, weight_decay=0.1)
    used.grad = torch.ones_like(used)
    lars.step()
    assert torch.equal(unused, torch.ones(3, 3))
    assert not torch.equal(used, torch.ones(3, 3))


def poison(zero, stage: int) -> int:
    """Set DeepSpeed's padding to NaN: nothing may read it.  Returns the number of elements on this rank."""
    count = 0
    if stage in (1, 2):
        for flat, padding in zip(zero.single_partition_of_fp32_groups, zero.groups_padding):
            flat.data[flat.numel() - padding :] = torch.nan
            count += padding
    if stage == 3:
        for params, flat, paddings in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, zero.groups_padding):
            end = 0
            for p, padding in zip(params, paddings):
                end += p.partition_numel()
                flat.data[end - padding : end] = torch.nan
                count += padding
    return count


def worker(out: str) -> None:
    """One of two ranks: every optimizer under every ZeRO stage, half of each batch per rank."""
    import deepspeed

    from fastssl import dist

    dist.init("cpu")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled first
    deepspeed.init_distributed("gloo")
    results = {}
    for name, settings in SETTINGS.items():
        for stage in range(4):
            net = Net()
            optimizer, schedule = optim.build(net.named_parameters(), settings, steps_per_epoch=5)
            zero = {"stage": stage, "stage3_param_persistence_threshold": 20}
            if stage == 3 and name == "solo":
                zero["sub_group_size"] = 40  # several partitions for one group of the optimizer
            engine, *_ = deepspeed.initialize(
                model=net,
                optimizer=optimizer,
                config={
                    "train_micro_batch_size_per_gpu": 4,
                    "gradient_clipping": 0.0,
                    "zero_optimization": zero,
                    "zero_allow_untested_optimizer": True,
                },
            )
            optim.attach(engine)
            poisoned = poison(engine.optimizer, stage) if settings.name == "lars" else 0
            for step, (x, y) in enumerate(batches()):
                schedule.set_lr(engine.optimizer, step)
                mine = slice(4 * dist.rank(), 4 * dist.rank() + 4)
                engine.backward((engine(x[mine]) - y[mine]).square().mean())
                engine.step()
            with deepspeed.zero.GatheredParameters(list(net.parameters()), enabled=stage == 3):
                results[f"{name} {stage}"] = {k: p.detach().clone() for k, p in net.named_parameters()}
            results[f"{name} {stage} padding"] = dist.sum_(torch.tensor(poisoned)).item()
    if dist.is_main():
        torch.save(results, out)
    dist.shutdown()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    out = tmp_path_factory.mktemp("optim") / "results.pt"
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__, str(out)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(out)


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("name", SETTINGS)
def test_two_ranks_under_zero_are_one_process(sharded, name, stage):
    start, plain = dict(Net().named_parameters()), train(SETTINGS[name])
    for key, value in sharded[f"{name} {stage}"].items():
        torch.testing.assert_close(value, plain[key], rtol=1e-5, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")
        assert (value - start[key]).abs().max() > 1e-5, f"{key} has not moved: the comparison would be empty"
    if SETTINGS[name].name == "lars":
        assert (sharded[f"{name} {stage} padding"] > 0) == (stage > 0)


def test_lars_refuses_partitions_that_it_was_not_told_about():
    lars = optim.Lars([torch.ones(3, 3, requires_grad=True)], lr=1.0)
    flat = torch.ones(5, requires_grad=True)
    flat.grad = torch.ones(5)
    lars.param_groups[0]["params"] = [flat]
    with pytest.raises(RuntimeError, match="attach"):
        lars.step()


def groups(**options):
    net = Net()
    schedule = optim.Schedule(net.named_parameters(), Optim(**{"lr": 1.0, **options}), steps_per_epoch=10)
    names = {id(p): name for name, p in net.named_parameters()}
    return schedule, [({names[id(p)] for p in g.params}, g.options) for g in schedule.groups]


def test_all_patterns_apply_and_the_later_wins():
    _, found = groups(
        name="lars",
        weight_decay=0.5,
        paramwise={
            "ndim<=1": {"weight_decay": 0.0, "lars_exclude": True},
            "predictor|head": {"lr_mult": 10.0, "weight_decay": 0.2},
        },
    )
    options = {name: o for names, o in found for name in names}
    assert options["downsample.1.weight"] == {"lr": 1.0, "weight_decay": 0.0, "momentum": 0.9, "lars_exclude": True}
    assert options["head.bias"] == {"lr": 10.0, "weight_decay": 0.2, "momentum": 0.9, "lars_exclude": True}
    assert options["predictor.weight"]["lars_exclude"] is False
    assert options["conv.weight"] == {"lr": 1.0, "weight_decay": 0.5, "momentum": 0.9, "lars_exclude": False}
    assert sum(len(names) for names, _ in found) == len(list(Net().parameters()))


def test_the_shape_pattern_catches_the_norm_that_names_miss():
    """OpenSelfSup's regex left the batch norm called downsample.1 under LARS and weight decay."""
    _, by_name = groups(paramwise={r"(bn|gn)(\d+)?.(weight|bias)|bias": {"weight_decay": 0.0}})
    _, by_shape = groups(paramwise={optim.NORM_AND_BIAS: {"weight_decay": 0.0}})
    decayed = [{n for names, o in found for n in names if o["weight_decay"]} for found in (by_name, by_shape)]
    assert decayed[0] - decayed[1] == {"downsample.1.weight"}


def test_the_table_names_patterns_counts_and_options():
    schedule, _ = groups(
        name="lars",
        weight_decay=0.5,
        batch=512,
        base_batch=256,
        paramwise={"ndim<=1": {"lars_exclude": True}, "predictor": {"schedule": "constant", "lr": 0.3}},
    )
    lines = schedule.table.splitlines()
    assert lines[0] == "linear scaling: lr 1 x batch 512 / 256 = 2"
    row = next(line for line in lines if line.startswith("predictor"))
    assert row.split()[1:3] == ["1", "33"]
    assert "lr 0.3" in row and "constant lr" in row
    assert "no LARS" in next(line for line in lines if line.startswith("ndim<=1"))
    assert any(line.startswith("(no pattern)") for line in lines)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"paramwise": {"nothing_like_it": {"lr_mult": 2.0}}}, "'nothing_like_it' matches no parameter"),
        ({"paramwise": {"head": {"weight_deacy": 0.0}}}, "did you mean 'weight_decay'"),
        ({"paramwise": {"head": {"lr": "big"}}}, "must be a number"),
        ({"paramwise": {"head": {"schedule": "cosine"}}}, "must be 'constant'"),
        ({"paramwise": {"head": {"lars_exclude": 1}}}, "True or False"),
        ({"paramwise": {"(head": {"lr": 1.0}}}, "is not a regular expression"),
        ({"name": "adamw", "paramwise": {"head": {"momentum": 0.0}}}, "adamw has no momentum"),
        ({"schedule": "step"}, "needs optim.milestones"),
        ({"schedule": "cosin"}, "'cosin' is none of"),
        ({"epochs": 2, "warmup_epochs": 2.0}, "not shorter than the run"),
        ({"weight_decay": 0.0, "weight_decay_end": 0.4}, "weight_decay > 0"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message.replace("(", "\\(")):
        groups(**options)


def curve(settings: Optim, per_epoch: int, total: int) -> list[float]:
    return [optim.lr_multiplier(settings, s, per_epoch, total) for s in range(total)]


def test_cosine_after_warm_up():
    lrs = curve(Optim(schedule="cosine", warmup_epochs=2, warmup_ratio=0.1, lr_end=0.2), 10, 100)
    assert lrs[0] == pytest.approx(0.1)
    assert lrs[10] == pytest.approx(0.55)  # half-way up
    assert lrs[20] == 1.0
    assert lrs[60] == pytest.approx(0.6)  # half-way down to 0.2
    assert lrs[19] < lrs[20] > lrs[21] and lrs[99] == pytest.approx(0.2, abs=1e-3)


def test_openselfsup_staircase():
    """mmcv 1.0.3: constant inside an epoch, counted from epoch 0, times 1 - (1 - it / warm)(1 - ratio)."""
    lrs = curve(Optim(schedule="cosine_epoch", warmup_epochs=2, warmup_ratio=1e-4), 10, 100)
    for step, lr in enumerate(lrs):
        regular = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * (step // 10) / 10)).item())
        assert lr == pytest.approx(regular * (1 - (1 - step / 20) * (1 - 1e-4) if step < 20 else 1.0), rel=1e-6)


def test_step_schedule_falls_at_its_epochs():
    lrs = curve(Optim(schedule="step", milestones=(3.0, 6.0), gamma=0.1), 10, 100)
    assert [lrs[29], lrs[30], lrs[59], lrs[60]] == pytest.approx([1, 0.1, 0.1, 0.01])
    assert set(curve(Optim(schedule="constant"), 10, 100)) == {1.0}


def test_set_lr_writes_every_group():
    net = Net()
    settings = Optim(
        name="adamw",
        lr=0.5,
        epochs=10,
        weight_decay=0.04,
        weight_decay_end=0.4,
        paramwise={"ndim<=1": {"weight_decay": 0.0}, "predictor": {"schedule": "constant", "lr_mult": 0.1}},
    )
    optimizer, schedule = optim.build(net.named_parameters(), settings, steps_per_epoch=10)
    for group in optimizer.param_groups:
        group.update(optimizer.param_groups[0])  # what DeepSpeed's universal checkpoint leaves behind
    assert schedule.set_lr(optimizer, 50) == pytest.approx(0.25)
    found = {g.patterns: (t["lr"], t["weight_decay"]) for g, t in zip(schedule.groups, optimizer.param_groups)}
    assert found[()] == pytest.approx((0.25, 0.22))
    assert found[("ndim<=1",)] == pytest.approx((0.25, 0.0))
    assert found[("predictor",)] == pytest.approx((0.05, 0.22))


if __name__ == "__main__":
    worker(sys.argv[1])


@pytest.mark.parametrize("name", SETTINGS)
def test_rates_may_be_tensors(name):
    """A captured step reads them from the device; the numbers are the same, but for the order of rounding."""
    results = []
    for as_tensor in (False, True):
        net = Net()
        optimizer, schedule = optim.build(net.named_parameters(), SETTINGS[name], steps_per_epoch=5)
        for step, (x, y) in enumerate(batches()):
            schedule.set_lr(optimizer, step)
            if as_tensor:
                for group in optimizer.param_groups:
                    group.update({k: torch.tensor(group[k]) for k in ("lr", "weight_decay")})
            optimizer.zero_grad()
            (net(x) - y).square().mean().backward()
            optimizer.step()
        results.append([p.detach() for p in net.parameters()])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("at", [0, 2])
def test_a_step_that_overflowed_changes_nothing(name, at):
    """Neither parameters nor state: the run goes on as if the step had not been."""
    results = []
    for overflow in (False, True):
        net = Net()
        optimizer, schedule = optim.build(net.named_parameters(), SETTINGS[name], steps_per_epoch=5)
        for step, (x, y) in enumerate(batches()):
            schedule.set_lr(optimizer, step)
            optimizer.zero_grad()
            (net(x) - y).square().mean().backward()
            if overflow and step == at:
                good = [p.grad.clone() for p in net.parameters()]
                for p in net.parameters():
                    p.grad.fill_(torch.nan)
                optimizer.found_inf = torch.ones(1)
                optimizer.step()
                for p, g in zip(net.parameters(), good):
                    p.grad.copy_(g)
            optimizer.found_inf = torch.zeros(1) if overflow else None
            optimizer.step()
        results.append([p.detach() for p in net.parameters()])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_sgd_is_torchs():
    nets = Net().double(), Net().double()
    ours, schedule = optim.build(nets[0].named_parameters(), SETTINGS["sgd"], steps_per_epoch=5)
    options = [
        {
            "params": [p for n, p in nets[1].named_parameters() if n.startswith("predictor") == own],
            "momentum": 0.5 if own else 0.9,
        }
        for own in (False, True)
    ]
    theirs = torch.optim.SGD(options, lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True)
    for step, (x, y) in enumerate(batches()):
        schedule.set_lr(ours, step)
        theirs.param_groups[0]["lr"] = 0.1 * schedule.multiplier(step)
        for net, optimizer in zip(nets, (ours, theirs)):
            optimizer.zero_grad()
            (net(x.double()) - y).square().mean().backward()
            optimizer.step()
    for a, b in zip(*(net.parameters() for net in nets)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
