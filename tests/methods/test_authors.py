"""First steps of methods against the formulas of the authors' code, in float64."""

import itertools
import math
from types import SimpleNamespace

import method_cases as cases
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastssl import optim
from fastssl.config import Optim
from fastssl.methods import barlow, dino, npid, parts, relative_loc, swav
from fastssl.trainer import Context

N = 12


class Net(nn.Module):
    """A small network with batch norm, with the attributes of a backbone."""

    def __init__(self, dim=8):
        super().__init__()
        self.dim, self.spec = dim, SimpleNamespace(name="net")
        self.conv, self.norm = nn.Conv2d(3, dim, 3), nn.BatchNorm2d(dim)

    def forward(self, x):
        return self.norm(self.conv(x)).relu().mean((2, 3))


def build(config, backbone=None):
    torch.manual_seed(0)
    return config.build(backbone or Net(), Context(samples=60, batch=N, kernels="reference")).double()


def images(views, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(N, 3, 8, 8, dtype=torch.float64, generator=g) for _ in range(views)]


def batch(epoch=0, step=0):
    return SimpleNamespace(index=torch.arange(N), epoch=epoch, step=step)


def assert_close(a, b, rtol=1e-12, atol=1e-13):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def train(method, settings, views, steps, per_epoch=2):
    """Losses of `steps` steps, trained as by the engine at ZeRO 0."""
    settings = optim.frozen(settings, getattr(method, "freeze_epochs", {}))
    optimizer, schedule = optim.build(method.named_parameters(), settings, steps_per_epoch=per_epoch, impl="reference")
    losses = []
    for step in range(steps):
        schedule.set_lr(optimizer, step)
        at = batch(step // per_epoch, step % per_epoch)
        out = method(images(views, step), at)
        loss = method.loss(out, at)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step({k: v.detach() for k, v in out.items()}, at, step / schedule.total_steps)
        losses.append(loss.detach())
    return losses


def test_relative_loc_equals_openselfsups_sixteen_passes():
    """OpenSelfSup encodes all neighbours in one call, and the centre eight times in another."""
    method = build(relative_loc.Config(hidden=6, dropout=0.0))
    x = images(9)
    out = method(x, batch())
    loss = method.loss(out, batch())["loss"]
    grads = torch.autograd.grad(loss, list(method.parameters()))
    pairs = [torch.stack([x[i], x[4]], 1) for i in (0, 1, 2, 3, 5, 6, 7, 8)]
    first, second = torch.stack(pairs, 1).flatten(0, 1).unbind(1)
    logits = method.head(torch.cat([method.backbone(first), method.backbone(second)], 1))
    want = F.cross_entropy(logits, torch.arange(8).repeat(N))
    assert_close(loss, want)
    for ours, theirs in zip(grads, torch.autograd.grad(want, list(method.parameters()))):
        assert_close(ours, theirs)
    together = method.backbone(torch.cat(x))  # one call for all nine, which is something else
    assert (together[:N] - out["features"]).abs().max() > 1e-4


def larc_(weights, buffers, lr, decay, eta=1e-3):
    """Apex's LARC (no clipping) inside torch's SGD of momentum 0.9."""
    for i, w in enumerate(weights):
        if w.grad is None:
            continue
        d = w.grad
        if w.norm() and d.norm():
            d = eta * w.norm() / (d.norm() + decay * w.norm() + 1e-8) * (d + decay * w)
        buffers[i] = d if buffers[i] is None else 0.9 * buffers[i] + d
        w -= lr * buffers[i]


def test_swav_updates_equal_the_original():
    """main_swav.py: prototypes are normalised before each step, their gradient is None while they are frozen."""
    config = swav.Config(dims=(6, 4), prototypes=5, freeze_epochs=1)
    ours, theirs = build(config), build(config)
    settings = Optim(
        name="lars",
        lr=5.0,
        epochs=3,
        weight_decay=1e-2,
        schedule="constant",
        lr_in_momentum=False,
        lars_denominator="larc",
    )
    losses = train(ours, settings, 3, steps=6)
    weights, proto = list(theirs.parameters()), theirs.prototypes.weight
    buffers, start = [None] * len(weights), proto.detach().clone()
    for step in range(6):
        with torch.no_grad():
            proto.copy_(F.normalize(proto, dim=1))
        z = F.normalize(theirs.projector(theirs.backbone(torch.cat(images(3, step)))), dim=1)
        scores = F.linear(z, proto).unflatten(0, (3, N))
        loss = 0.0
        for i in range(2):
            with torch.no_grad():
                q = (scores[i] / 0.05).exp().T
                q /= q.sum()
                for _ in range(3):
                    q /= q.sum(1, keepdim=True) * len(q)
                    q /= q.sum(0, keepdim=True) * N
                q = (q * N).T
            others = [-(q * F.log_softmax(scores[j] / 0.1, 1)).sum(1).mean() for j in range(3) if j != i]
            loss = loss + sum(others) / len(others) / 2
        assert_close(losses[step], loss.detach(), rtol=1e-6, atol=0)
        theirs.zero_grad()
        loss.backward()
        if step < 2:
            proto.grad = None
        with torch.no_grad():
            larc_(weights, buffers, 5.0, 1e-2)
    for a, b in zip(ours.parameters(), weights):
        assert_close(a.detach(), F.normalize(b.detach(), dim=1) if b is proto else b.detach(), rtol=1e-5, atol=1e-7)
    assert (ours.prototypes.weight - start).abs().max() > 1e-2, "the prototypes have been trained"


def test_dino_updates_equal_the_original():
    """main_dino.py: weight norm with g = 1, every tensor's gradient clipped, then None for the last layer's."""
    config = dino.Config(prototypes=7, dims=(6, 4), freeze_epochs=1)
    ours, theirs = build(config), build(config)
    settings = Optim(
        name="adamw",
        lr=1e-2,
        epochs=3,
        weight_decay=0.1,
        schedule="constant",
        clip=0.02,
        clip_each=True,
        paramwise={"ndim<=1": {"weight_decay": 0.0}},
    )
    losses = train(ours, settings, 3, steps=6)
    weights = [p for p in theirs.parameters() if p.requires_grad]
    flat = [p for p in weights if p.ndim == 1]
    adamw = torch.optim.AdamW(
        [{"params": [p for p in weights if p.ndim > 1], "weight_decay": 0.1}, {"params": flat, "weight_decay": 0.0}],
        lr=1e-2,
    )
    center = torch.zeros(7, dtype=torch.float64)
    for step in range(6):
        x = images(3, step)

        def head(h, head=theirs.head):
            return F.linear(F.normalize(head.mlp(h), dim=-1), F.normalize(head.prototypes.weight, dim=1))

        student = head(torch.cat([theirs.backbone(torch.cat(x))])).chunk(3)
        with torch.no_grad():
            raw = head(theirs.target[0](torch.cat(x[:2])), theirs.target[1])
            teacher = F.softmax((raw - center) / 0.04, -1).chunk(2)
        pairs = [
            -(t * F.log_softmax(s / 0.1, -1)).sum(-1).mean()
            for i, t in enumerate(teacher)
            for j, s in enumerate(student)
            if i != j
        ]
        loss = sum(pairs) / len(pairs)
        assert_close(losses[step], loss.detach(), rtol=1e-9)
        adamw.zero_grad()
        loss.backward()
        for p in weights:
            p.grad *= min(1.0, 0.02 / (float(p.grad.norm()) + 1e-6))
        if step < 2:
            theirs.head.prototypes.weight.grad = None
        adamw.step()
        with torch.no_grad():
            m = 1 - 0.004 * (1 + math.cos(math.pi * step / 6)) / 2  # momentum_schedule[it]
            for a, b in zip(theirs.target.parameters(), weights):
                a.copy_(m * a + (1 - m) * b)
            center = 0.9 * center + 0.1 * raw.mean(0)
    for a, b in zip(ours.parameters(), theirs.parameters()):
        assert_close(a.detach(), b.detach(), rtol=1e-7, atol=1e-9)


def test_barlow_updates_equal_the_original():
    """Their gradients on W GPUs are ours divided by W; lr_mult=0.024 / W and W times the weight decay compensate."""
    w, lr, decay = 16, 0.5, 1e-2
    config = barlow.Config(dims=(6, 4))
    ours, theirs = build(config), build(config)
    settings = Optim(
        name="lars",
        lr=lr,
        epochs=3,
        weight_decay=w * decay,
        schedule="constant",
        lr_in_momentum=False,
        lars_denominator="sum",
        paramwise={"ndim<=1": {"lr_mult": 0.024 / w, "weight_decay": 0.0, "lars_exclude": True}},
    )
    losses = train(ours, settings, 2, steps=3)
    mu = {}
    for step in range(3):
        z = [theirs.projector(theirs.backbone(x)) for x in images(2, step)]
        a, b = (F.batch_norm(v, None, None, training=True) for v in z)
        c = a.T @ b / N
        loss = (c.diagonal() - 1).square().sum() + 0.0051 * (c - torch.diag(c.diagonal())).square().sum()
        assert_close(losses[step], loss.detach(), rtol=1e-9)
        theirs.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in theirs.parameters():
                d = p.grad / w
                if p.ndim > 1:
                    d = d + decay * p
                    d = d * (1e-3 * p.norm() / d.norm())
                mu[p] = 0.9 * mu.get(p, 0.0) + d
                p -= (lr if p.ndim > 1 else lr * 0.024) * mu[p]
    for a, b in zip(ours.parameters(), theirs.parameters()):
        assert_close(a.detach(), b.detach(), rtol=1e-8, atol=1e-10)


def test_npid_with_zero_negatives_is_a_softmax_over_the_bank():
    """--nce-k 0 of zhirongw/lemniscate.pytorch."""
    method = build(npid.Config(dims=(4,), negatives=0, temperature=0.1))
    z = torch.randn(N, 4, dtype=torch.float64)
    logits = F.normalize(z, dim=1) @ method.bank.T / 0.1
    want = -(logits.diagonal() - logits.logsumexp(1)).mean()
    assert_close(method.loss({"z": z}, batch())["loss"], want)


@pytest.mark.parametrize("name, later", [("byol", 0), ("dino", 0), ("moco", 0), ("mocov3", 1)])
def test_momentum_schedule_equals_the_authors(name, later, monkeypatch):
    """BYOL and DINO: momentum at it / T after step `it`; MoCo v3: before step `it`, that is after step it - 1."""
    seen = []
    for module in (parts, parts.views):
        monkeypatch.setattr(module, "ema_", lambda target, online, momentum, **_: seen.append(float(momentum)))
    from fastssl import dist, engine
    from fastssl.step import step

    dist.init("cpu")
    settings = {"momentum_end": 1.0} if name == "moco" else {}
    t = cases.build(cases.run(name, steps=4, **settings))
    for _, micro_batches in itertools.islice(engine.batches(t), 2):
        step(t, micro_batches)
    want = [1 - 0.1 * (1 + math.cos(math.pi * (it + later) / 4)) / 2 for it in range(2)]
    assert seen == pytest.approx(want, rel=1e-6)
