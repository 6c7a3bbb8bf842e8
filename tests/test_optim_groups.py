"""Groups of parameters and schedules."""

import math

import pytest
from optim_cases import Net

from fastssl import optim
from fastssl.config import Optim


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
    _, twice = groups(paramwise={"head": {"lr_mult": 10.0}, "head.bias": {"lr_mult": 3.0}})
    assert [o["lr"] for names, o in twice if "head.bias" in names] == [3.0]
    assert options["predictor.weight"]["lars_exclude"] is False
    assert options["conv.weight"] == {"lr": 1.0, "weight_decay": 0.5, "momentum": 0.9, "lars_exclude": False}
    assert sum(len(names) for names, _ in found) == len(list(Net().parameters()))


def test_parameters_without_gradient_are_in_no_group():
    net = Net()
    net.conv.requires_grad_(False)
    (group,) = optim.group_parameters(net.named_parameters(), Optim(), 1.0)
    assert {id(p) for p in group.params} == {id(p) for n, p in net.named_parameters() if not n.startswith("conv")}


def test_paramwise_prevails_over_the_methods_freeze_epochs():
    settings = Optim(paramwise={"a": {"freeze_epochs": 0.5}, "b": {"lr_mult": 2.0}})
    found = optim.frozen(settings, {"a": 3, "b": 1, "c": 2, "d": 0}).paramwise
    assert found == {"a": {"freeze_epochs": 0.5}, "b": {"lr_mult": 2.0, "freeze_epochs": 1}, "c": {"freeze_epochs": 2}}


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
        ({"paramwise": {"head": {"lr": -1.0}}}, "=-1.0 must be a number >= 0"),
        ({"paramwise": {"head": {"lr": True}}}, "=True must be a number"),
        ({"paramwise": {"head": {"schedule": "cosine"}}}, "must be 'constant'"),
        ({"paramwise": {"head": {"lars_exclude": 1}}}, "True or False"),
        ({"paramwise": {"(head": {"lr": 1.0}}}, "is not a regular expression"),
        ({"name": "adamw", "paramwise": {"head": {"momentum": 0.0}}}, "adamw has no momentum"),
        ({"schedule": "step"}, "needs optim.milestones"),
        ({"schedule": "cosin"}, "'cosin' is not one of"),
        ({"epochs": 2, "warmup_epochs": 2.0}, "not shorter than the run"),
        ({"weight_decay": 0.0, "weight_decay_end": 0.4}, "weight_decay > 0"),
    ],
)
def test_wrong_paramwise_options_raise(options, message):
    with pytest.raises(ValueError, match=message.replace("(", "\\(")):
        groups(**options)


def curve(settings: Optim, per_epoch: int, total: int) -> list[float]:
    return [optim.lr_multiplier(settings, s, per_epoch, total) for s in range(total)]


def test_warm_up_is_followed_by_a_cosine():
    lrs = curve(Optim(schedule="cosine", warmup_epochs=2, warmup_ratio=0.1, lr_end=0.2), 10, 100)
    assert lrs[0] == pytest.approx(0.1)
    assert lrs[10] == pytest.approx(0.55)  # half-way up
    assert lrs[20] == 1.0
    assert lrs[60] == pytest.approx(0.6)  # half-way down to 0.2
    assert lrs[19] < lrs[20] > lrs[21] and lrs[99] == pytest.approx(0.2, abs=1e-3)
    assert optim.lr_multiplier(Optim(schedule="cosine", lr_end=0.2), 150, 10, 100) == pytest.approx(0.2)


def test_cosine_epoch_equals_openselfsups():
    """mmcv 1.0.3: constant inside an epoch, counted from epoch 0, times 1 - (1 - it / warm)(1 - ratio)."""
    lrs = curve(Optim(schedule="cosine_epoch", warmup_epochs=2, warmup_ratio=1e-4, lr_end=0.1), 10, 95)
    for step, lr in enumerate(lrs):
        regular = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step // 10) / 10))
        assert lr == pytest.approx(regular * (1 - (1 - step / 20) * (1 - 1e-4) if step < 20 else 1.0), rel=1e-6)


def test_step_schedule_falls_at_its_epochs():
    lrs = curve(Optim(schedule="step", milestones=(3.0, 6.0), gamma=0.1), 10, 100)
    assert [lrs[29], lrs[30], lrs[59], lrs[60]] == pytest.approx([1, 0.1, 0.1, 0.01])
    lrs = curve(Optim(schedule="step", milestones=(0.29,), gamma=0.1), 100, 100)
    assert [lrs[28], lrs[29]] == pytest.approx([1, 0.1])  # 0.29 * 100 is less than 29
    assert set(curve(Optim(schedule="constant"), 10, 100)) == {1.0}
    for schedule in ("constant", "step"):
        lrs = curve(Optim(schedule=schedule, milestones=(1.0,), warmup_epochs=2, warmup_ratio=0), 10, 100)
        assert [lrs[5], lrs[20]] == pytest.approx([0.25, 1.0 if schedule == "constant" else 0.1])


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

    settings = Optim(name="lars", paramwise={"ndim<=1": {"lars_exclude": True, "momentum": 0.5}}, steps=7)
    optimizer, schedule = optim.build(net.named_parameters(), settings, steps_per_epoch=10)
    for group in optimizer.param_groups:
        group.update({"lars_exclude": None, "momentum": None})
    schedule.set_lr(optimizer, 0)
    found = {g.patterns: (t["lars_exclude"], t["momentum"]) for g, t in zip(schedule.groups, optimizer.param_groups)}
    assert found == {(): (False, 0.9), ("ndim<=1",): (True, 0.5)} and schedule.total_steps == 7
