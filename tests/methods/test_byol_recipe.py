"""BYOL's recipe against the authors' code (google-deepmind/deepmind-research, byol/), written out in float64."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.func import functional_call

from fastssl import backbones, config, optim
from fastssl.config import Backbone
from fastssl.trainer import Context

CONFIGS = Path(__file__).parents[2] / "configs" / "byol"
EPOCHS, STEPS_PER_EPOCH, N = 100, 1, 8  # ten steps of warm-up
PRESETS = {100: (0.45, 1e-6, 0.99), 300: (0.3, 1e-6, 0.99), 1000: (0.2, 1.5e-6, 0.996)}  # their configs/byol.py


def recipe(epochs=EPOCHS):
    return config.load(CONFIGS / f"r50_in1k_bs4096_{epochs}ep_bf16.py")


def build(run):
    """The recipe's method with small heads on a small network."""
    torch.manual_seed(0)
    settings = replace(run.method, dims=(24, 12), predictor_dim=20)
    spec = Backbone("resnet10", stem="cifar", width=8, zero_init_residual=run.backbone.zero_init_residual)
    return settings.build(backbones.build(spec, settings), Context(1, 1)).double().train()


def cosine_decay(step, total):
    return 0.5 * (1 + math.cos(math.pi * min(step, total) / total))


def learning_rate(step, base, epochs, per_epoch):
    total, warm = epochs * per_epoch, 10 * per_epoch
    scaled = base * 4096 / 256
    return step / warm * scaled if step < warm else scaled * cosine_decay(step - warm, total - warm)


def target_momentum(step, base, total):
    return 1 - (1 - base) * cosine_decay(step, total)


class Authors:
    """Networks, loss, LARS and target update as in byol_experiment.py, utils/networks.py and utils/optimizers.py."""

    def __init__(self, method):
        named = {k: v.detach().clone() for k, v in method.named_parameters()}
        self.encoder = method.backbone
        self.online = {k: v.requires_grad_() for k, v in named.items() if not k.startswith("target")}
        names = {"target.0.": "backbone.", "target.1.": "projector."}
        self.target = {names[k[:9]] + k[9:]: v for k, v in named.items() if k.startswith("target")}
        self.mu = {k: torch.zeros_like(v) for k, v in self.online.items()}

    def project(self, weights, images):
        encoder = {k.removeprefix("backbone."): v for k, v in weights.items() if k.startswith("backbone.")}
        return self.head(weights, "projector", functional_call(self.encoder, encoder, images))

    @staticmethod
    def head(weights, name, x):
        assert {k for k in weights if k.startswith(name)} == {
            f"{name}.{k}" for k in ("0.weight", "0.bias", "1.weight", "1.bias", "3.weight")
        }
        x = x @ weights[f"{name}.0.weight"].T + weights[f"{name}.0.bias"]
        x = (x - x.mean(0)) * (x.var(0, unbiased=False) + 1e-5).rsqrt()
        x = (x * weights[f"{name}.1.weight"] + weights[f"{name}.1.bias"]).clamp(min=0)
        return x @ weights[f"{name}.3.weight"].T

    def loss(self, images):
        unit = lambda x: x * x.square().sum(-1, keepdim=True).clamp(min=1e-12).rsqrt()  # noqa: E731
        p = [unit(self.head(self.online, "predictor", self.project(self.online, x))) for x in images]
        z = [unit(self.project(self.target, x)).detach() for x in images]
        return ((p[0] - z[1]).square().sum(-1) + (p[1] - z[0]).square().sum(-1)).mean()

    @torch.no_grad()
    def update(self, grads, lr, weight_decay, momentum):
        for (name, w), g in zip(self.online.items(), grads):
            if w.ndim > 1:  # neither a bias nor of a norm
                g = g + weight_decay * w
                ratio = 1e-3 * w.norm() / g.norm() if w.norm() > 0 and g.norm() > 0 else 1.0
                g = ratio * g
            self.mu[name] = 0.9 * self.mu[name] + g
            w -= lr * self.mu[name]
        for name, w in self.target.items():
            w += (1 - momentum) * (self.online[name] - w)


def test_first_steps_equal_the_authors():
    """Loss, gradients and parameters in eleven steps: the warm-up and the first step of the cosine."""
    run = recipe()
    method = build(run)
    theirs = Authors(method)
    lr, weight_decay, momentum = PRESETS[EPOCHS]
    ours = {k: p for k, p in method.named_parameters() if p.requires_grad}
    optimizer, schedule = optim.build(ours.items(), run.optim, steps_per_epoch=STEPS_PER_EPOCH)
    close = {"rtol": 1e-9, "atol": 1e-12}
    g = torch.Generator().manual_seed(1)
    for step in range(11):
        images = [torch.rand(N, 3, 16, 16, generator=g, dtype=torch.float64) for _ in range(2)]
        want = theirs.loss(images)
        grads = torch.autograd.grad(want, list(theirs.online.values()))
        theirs.update(
            grads,
            learning_rate(step, lr, EPOCHS, STEPS_PER_EPOCH),
            weight_decay,
            target_momentum(step, momentum, EPOCHS),
        )

        schedule.set_lr(optimizer, step)
        optimizer.zero_grad()
        out = method(images, batch := SimpleNamespace(epoch=step))
        got = method.loss(out, batch)["loss"]
        got.backward()
        torch.testing.assert_close(got, want, **close)
        for name, grad in zip(theirs.online, grads):
            torch.testing.assert_close(ours[name].grad, grad, **close)
        optimizer.step()
        method.after_step(out, batch, step / EPOCHS)
        for name, value in theirs.online.items():
            torch.testing.assert_close(ours[name], value, **close)
        target = dict(method.target[0].named_parameters(prefix="backbone"))
        target |= dict(method.target[1].named_parameters(prefix="projector"))
        assert target.keys() == theirs.target.keys()
        for name, value in theirs.target.items():
            torch.testing.assert_close(target[name].detach(), value, **close)
    assert (theirs.target["projector.0.weight"] - theirs.online["projector.0.weight"]).abs().max() > 1e-6


@pytest.mark.parametrize("epochs", PRESETS)
def test_schedules_equal_the_authors(epochs):
    run, per_epoch = recipe(epochs), 312
    base, weight_decay, momentum = PRESETS[epochs]
    assert (run.method.momentum, run.method.momentum_end) == (momentum, 1.0)
    w = nn.Parameter(torch.zeros(2, 2))
    schedule = optim.Schedule([("w", w), ("b", nn.Parameter(torch.zeros(2)))], run.optim, steps_per_epoch=per_epoch)
    assert [g.options["weight_decay"] for g in schedule.groups] == [weight_decay, 0.0]
    total = epochs * per_epoch
    for step in (0, 1, 10 * per_epoch - 1, 10 * per_epoch, total // 2, total - 1):
        want = learning_rate(step, base, epochs, per_epoch)
        assert schedule.lr * schedule.multiplier(step) == pytest.approx(want, rel=1e-12, abs=1e-15)


def test_haiku_initialisation():
    """A normal distribution truncated at two standard deviations has 0.8796 of its standard deviation."""
    method = build(recipe())
    checked = 0
    for name, layer in method.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and not name.startswith("target"):
            fan_in = layer.weight[0].numel()
            scaled = layer.weight.detach() * math.sqrt(fan_in)
            assert scaled.abs().max() <= 2 + 1e-6, name
            assert scaled.std() == pytest.approx(0.8796, rel=5 / math.sqrt(scaled.numel())), name
            assert layer.bias is None or not layer.bias.any(), name
            checked += 1
    assert checked == 16  # twelve convolutions, four linear layers
    assert not method.backbone.layer1[0].bn2.weight.any()
    assert method.projector[-1].bias is None and method.predictor[-1].bias is None
