"""Images whose class is the direction of stripes, and loaders of them.  Not a test."""

import numpy as np
import pytest
from conftest import write_beton
from torch import nn

import fastssl.eval
from fastssl.config import Backbone
from fastssl.kernels.augment import View
from fastssl.loader import Loader
from fastssl.sampler import Sampler

SPEC = Backbone("resnet10", stem="cifar", width=8)


VIEW = View(16, crop="center")


NET = ["--backbone", "resnet10", "--stem", "cifar", "--width", 8, "--size", 16, "--features", "untrained"]


def stripes(rng, direction, side=16):
    """uint8 image: stripes of random phase and colour, vertical, horizontal or diagonal (either way), in noise."""
    y, x = np.mgrid[:side, :side]
    along = (x, y, x + rng.choice((-1, 1)) * y)[direction]
    wave = np.sin(2 * np.pi * (along / 4 + rng.random()))[..., None] * rng.uniform(-70, 70, 3)
    return np.clip(128 + wave + rng.normal(0, 30, (side, side, 3)), 0, 255).astype(np.uint8)


def make(path, n, seed):
    rng = np.random.default_rng(seed)
    return str(write_beton(path, [stripes(rng, i % 3) for i in range(n)], [i % 3 for i in range(n)]))


@pytest.fixture(scope="module", name="files")
def files_fixture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stripes")
    return make(folder / "train.beton", 192, 0), make(folder / "test.beton", 90, 1)


def training(path, batch, **options):
    return Loader(path, batch, Sampler(**options), device="cpu", workers=1)


def evaluation(path):
    return training(path, 64, shuffle=False, drop_last=False)


class Linear(nn.Module):
    """A backbone whose gradient can be written down."""

    def __init__(self, dim=5):
        super().__init__()
        self.dim, self.layer = dim, nn.Linear(3 * 16 * 16, dim, bias=False)

    def forward(self, x):
        return self.layer(x.flatten(1))


def call(files, protocol, *argv):
    argv = [protocol, "--train", files[0], "--test", files[1], *NET, *argv, "--device", "cpu", "--workers", 1]
    try:
        return fastssl.eval.main([str(word) for word in argv])
    except SystemExit as stop:
        return stop.code
