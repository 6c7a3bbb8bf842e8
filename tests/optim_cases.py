"""A small network, batches and the settings with which the optimizers are tested.  Not a test."""

import torch
from torch import nn

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
