"""LARS against plain translations of its two sources, SGD, clipping, and steps that overflow."""

from dataclasses import replace

import pytest
import torch
from optim_cases import SETTINGS, Net, batches
from torch.utils._python_dispatch import TorchDispatchMode

from fastssl import optim
from fastssl.config import Optim
from fastssl.kernels.multi_tensor import LarsOptions


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
def test_lars_equals_its_sources(source, dampening, nesterov, exclude):
    wd, solo = (0.0 if exclude else 0.1), source is solo_learn
    ours = [torch.randn(s, dtype=torch.float64).requires_grad_() for s in ((4, 3), (5,), (2, 2))]
    with torch.no_grad():
        ours[2].zero_()  # OpenSelfSup never moved such a tensor
    lars = optim.Lars(
        ours,
        LarsOptions(
            lr=0.7,
            weight_decay=wd,
            momentum=0.9,
            dampening=dampening,
            nesterov=nesterov,
            eta=0.02 if solo else 1e-3,
            clip_lr=solo,
            lr_in_momentum=not solo,
        ),
        lars_exclude=exclude,
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
def test_lars_denominators_equal_their_sources(denominator):
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


def test_settings_reach_the_optimizer():
    settings = replace(SETTINGS["solo"], dampening=0.2, nesterov=True)
    found = optim.build(Net().named_parameters(), settings, steps_per_epoch=5)[0].defaults
    names = ("clip_lr", "lr_in_momentum", "eta", "dampening", "nesterov", "momentum", "weight_decay", "lr")
    assert {k: found[k] for k in names} == {k: getattr(settings, k) for k in names}
    for wrong in ({"dampening": 0.1}, {"momentum": 0.0}):
        with pytest.raises(ValueError, match="optim.nesterov=True needs optim.momentum above 0"):
            optim.build(Net().named_parameters(), replace(SETTINGS["sgd"], **wrong), steps_per_epoch=5)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_frozen_group_equals_dinos_gradient_of_none(name):
    """Neither decay nor moments nor the step count of Adam run on while a group is frozen."""
    moments = {"betas": (0.8, 0.95), "eps": 1e-2} if name == "adamw" else {}
    settings = Optim(
        name=name,
        lr=0.1,
        weight_decay=0.1,
        epochs=1,
        schedule="constant",
        paramwise={"^head": {"freeze_epochs": 0.6}},
        **moments,
    )
    nets = Net().double(), Net().double()
    ours, schedule = optim.build(nets[0].named_parameters(), settings, steps_per_epoch=5)
    kind, options = (torch.optim.AdamW, moments) if name == "adamw" else (torch.optim.SGD, {"momentum": 0.9})
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


def test_clip_each_equals_dinos_clipping():
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
    together, _ = optim.build(net.named_parameters(), replace(settings, clip_each=False), steps_per_epoch=5)
    assert together.clip_each == 0  # the engine clips
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

    for name, found_inf in (("lars", None), ("solo", None), ("lars", torch.zeros(1))):
        net = Net()
        optimizer, schedule = optim.build(net.named_parameters(), SETTINGS[name], steps_per_epoch=5)
        optimizer.found_inf = found_inf
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        with Ops():
            for step in range(2):
                schedule.set_lr(optimizer, step)
                optimizer.step()
        assert "_foreach_norm" in seen
        assert not seen & {"_local_scalar_dense", "is_nonzero", "equal", "_to_copy", "nonzero"}


def test_parameters_without_gradient_do_not_change():
    used, unused = torch.ones(3, 3, requires_grad=True), torch.ones(3, 3, requires_grad=True)
    lars = optim.Lars([used, unused], LarsOptions(lr=1.0, weight_decay=0.1, momentum=0.9))
    used.grad = torch.ones_like(used)
    lars.step()
    assert torch.equal(unused, torch.ones(3, 3))
    assert not torch.equal(used, torch.ones(3, 3))


def rates_to_tensors(optimizer):
    for group in optimizer.param_groups:
        group.update({k: torch.tensor(group[k]) for k in ("lr", "weight_decay")})


@pytest.mark.parametrize("name", SETTINGS)
def test_lr_and_weight_decay_may_be_tensors(name):
    """A captured step reads them from the device; the numbers are the same, but for the order of rounding."""
    results = []
    for as_tensor in (False, True):
        net = Net()
        optimizer, schedule = optim.build(net.named_parameters(), SETTINGS[name], steps_per_epoch=5)
        for step, (x, y) in enumerate(batches()):
            schedule.set_lr(optimizer, step)
            if as_tensor:
                rates_to_tensors(optimizer)
            optimizer.zero_grad()
            (net(x) - y).square().mean().backward()
            before = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
            optimizer.step()
            assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == before
        results.append([p.detach() for p in net.parameters()])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


DAMPED = Optim(name="sgd", lr=0.1, momentum=0.9, dampening=0.5, epochs=1)  # the first step has no dampening


@pytest.mark.parametrize("name", [*SETTINGS, "damped"])
@pytest.mark.parametrize("at, as_tensor", [(0, False), (2, False), (2, True)])
def test_a_step_that_overflowed_changes_nothing(name, at, as_tensor):
    """Neither parameters nor state: the run goes on as if the step had not been."""
    results = []
    for overflow in (False, True):
        net = Net()
        optimizer, schedule = optim.build(net.named_parameters(), SETTINGS.get(name, DAMPED), steps_per_epoch=5)
        for step, (x, y) in enumerate(batches()):
            schedule.set_lr(optimizer, step)
            if as_tensor:
                rates_to_tensors(optimizer)
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


@pytest.mark.parametrize("kind", [{"nesterov": True, "dampening": 0.0}, {"nesterov": False, "dampening": 0.4}])
def test_sgd_equals_torchs(kind):
    nets = Net().double(), Net().double()
    ours, schedule = optim.build(nets[0].named_parameters(), replace(SETTINGS["sgd"], **kind), steps_per_epoch=5)
    options = [
        {
            "params": [p for n, p in nets[1].named_parameters() if n.startswith("predictor") == own],
            "momentum": 0.5 if own else 0.9,
        }
        for own in (False, True)
    ]
    theirs = torch.optim.SGD(options, lr=0.1, momentum=0.9, weight_decay=1e-2, **kind)
    for step, (x, y) in enumerate(batches()):
        schedule.set_lr(ours, step)
        theirs.param_groups[0]["lr"] = 0.1 * schedule.multiplier(step)
        for net, optimizer in zip(nets, (ours, theirs)):
            optimizer.zero_grad()
            (net(x.double()) - y).square().mean().backward()
            optimizer.step()
    for a, b in zip(*(net.parameters() for net in nets)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
