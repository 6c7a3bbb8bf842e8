"""BYOL's recipe against the formulas of its authors' code (google-deepmind/deepmind-research, byol/), in float64."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fastssl import backbones, config, optim
from fastssl.config import Backbone

CONFIGS = Path(__file__).parents[2] / "configs" / "byol"
PRESETS = {100: (0.45, 1e-6, 0.99), 300: (0.3, 1e-6, 0.99), 1000: (0.2, 1.5e-6, 0.996)}  # their configs/byol.py


def recipe(epochs=100):
    return config.load(CONFIGS / f"r50_in1k_bs4096_{epochs}ep_bf16.py")


def build(run):
    """The recipe's method on a network that a test can train."""
    torch.manual_seed(0)
    settings = replace(run.method, dims=(24, 12), predictor=20)
    spec = Backbone("resnet10", stem="cifar", width=8, zero_init_residual=run.backbone.zero_init_residual)
    return settings.build(backbones.build(spec, settings)).double().train()


# ---- the authors' formulas -------------------------------------------------------------------------------------------


def cosine_decay(step, total):
    return 0.5 * (1 + math.cos(math.pi * min(step, total) / total))


def learning_rate(step, base, epochs, per_epoch):
    total, warm = epochs * per_epoch, 10 * per_epoch
    scaled = base * 4096 / 256
    return step / warm * scaled if step < warm else scaled * cosine_decay(step - warm, total - warm)


# ---- and ours --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", PRESETS)
def test_schedules_are_the_authors(epochs):
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


def test_initial_values_are_haikus():
    """Truncated at two standard deviations of 1 / sqrt(fan_in): 0.8796 of it remains."""
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
