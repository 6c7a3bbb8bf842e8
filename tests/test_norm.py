"""Synchronised batch norm of networks that are not torchvision's.  Its values on ranks: tests/test_engine.py."""

import copy

import pytest
import timm
import torch
from torch import nn

from fastssl import norm


@pytest.fixture
def two_ranks(monkeypatch):
    """Both with the same images."""
    monkeypatch.setattr(norm.dist, "world", lambda: 2)
    monkeypatch.setattr(norm.dist, "mean", lambda x: x)


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet"])  # with an activation, without
def test_timm_s_batch_norm_keeps_its_activation(two_ranks, name):
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=0).train()
    ours = norm.convert_sync_bn(copy.deepcopy(net), torch.device("cpu"))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in ours.modules())
    x = torch.randn(8, 3, 64, 64)
    torch.testing.assert_close(ours(x), net(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.eval()(x), net.eval()(x), rtol=1e-2, atol=1e-2)  # variances over 2n - 1
    there = norm.convert_sync_bn(copy.deepcopy(net), torch.device("cuda"))  # converting needs no GPU
    torch.testing.assert_close(there.eval()(x), net.eval()(x), rtol=1e-5, atol=1e-5)


def test_an_unknown_subclass_of_batch_norm_is_refused(two_ranks):
    class Shifted(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) + 1

    with pytest.raises(ValueError, match="Shifted is a batch norm that does more"):
        norm.convert_sync_bn(nn.Sequential(Shifted(3)), torch.device("cpu"))
