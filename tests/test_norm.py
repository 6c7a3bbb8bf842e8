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


@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_on_one_rank_it_is_torchs(options, dtype):
    torch.manual_seed(0)
    ours, theirs = norm.SyncBatchNorm(5, **options), nn.BatchNorm2d(5, **options)
    if dtype == torch.float64:
        ours, theirs = ours.double(), theirs.double()
    if ours.affine:
        nn.init.uniform_(ours.weight), nn.init.uniform_(ours.bias)
        theirs.load_state_dict(ours.state_dict())
    for training in (True, True, True, False):
        x = (3 + torch.randn(8, 5, 4, 4)).to(dtype)
        a, b = (m.train(training)(x) for m in (ours, theirs))
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, **({} if dtype == torch.float64 else {"rtol": 1e-2, "atol": 2e-2}))
    for name, value in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), value, rtol=1e-6, atol=1e-6)


def test_the_layer_between_norm_and_activation_is_kept(two_ranks):
    net = nn.Sequential(timm.layers.BatchNormAct2d(3, drop_layer=nn.Softsign))
    ours, x = norm.convert_sync_bn(copy.deepcopy(net), torch.device("cpu")), torch.randn(8, 3, 4, 4)
    torch.testing.assert_close(ours(x), net(x), rtol=1e-5, atol=1e-5)


def test_a_norm_without_running_statistics_has_none_to_save():
    saved = norm.SavedStatistics(nn.BatchNorm1d(3, track_running_stats=False))
    saved.add(), saved.apply_mean(2)
    assert not saved.buffers
    backup = norm.StatisticsBackup(nn.Linear(2, 2))
    backup.save(), backup.restore_where(torch.tensor(True))


def test_the_statistics_of_a_skipped_step_are_restored():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2), nn.BatchNorm1d(2), nn.LayerNorm(2))
    net(torch.randn(8, 3))
    backup = norm.StatisticsBackup(net)
    for skipped in (False, True, True, False):
        backup.save()
        before = {name: b.clone() for name, b in net.named_buffers()}
        net(torch.randn(8, 3) * (torch.inf if skipped else 1))
        after = {name: b.clone() for name, b in net.named_buffers()}
        assert all(b.isnan().any() == skipped for name, b in after.items() if "running" in name)
        backup.restore_where(torch.tensor(skipped))
        for name, b in net.named_buffers():
            assert torch.equal(b, (before if skipped else after)[name]), name
            assert not torch.equal(before[name], after[name]), name


def test_an_unknown_subclass_of_batch_norm_is_refused(two_ranks):
    class Shifted(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) + 1

    with pytest.raises(ValueError, match="Shifted is a batch norm that does more"):
        norm.convert_sync_bn(nn.Sequential(Shifted(3)), torch.device("cpu"))
