"""For tests of methods' losses: a small backbone, random rows, a batch, and parts of the formulas in NumPy."""

from types import SimpleNamespace

import method_cases as cases
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fastssl.trainer import Context

N, D = 6, 5


LABEL = torch.tensor([0, 1, 0, 2, -1, 1])


class Tiny(nn.Module):
    """A backbone that is one linear layer over the pooled image, with a feature map of four places."""

    def __init__(self):
        super().__init__()
        self.dim = 8
        self.spec = SimpleNamespace(name="tiny")
        self.conv = nn.Conv2d(3, 8, 1)

    def forward_stages(self, x):
        return [F.adaptive_avg_pool2d(self.conv(x), 2)]

    def forward(self, x):
        return self.forward_stages(x)[-1].mean((2, 3))


def build(name, backbone=None, **settings):
    torch.manual_seed(0)
    config = cases.config(name, **settings)
    return config.build(backbone or Tiny(), Context(60, N, ["a", "b", "c"], seed=5)).double()


def rows(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def batch(n=N, epoch=0, step=0):
    return SimpleNamespace(index=torch.arange(n), label=LABEL[:n], epoch=epoch, step=step)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def close(got, want):
    np.testing.assert_allclose(float(torch.as_tensor(got).detach()), want, rtol=1e-12)


def array(x):
    return x.detach().numpy()


def mae(**settings):
    from fastssl import backbones
    from fastssl.config import Backbone

    return build("mae", backbones.build(Backbone("test_vit"), cases.config("mae")), **settings)
