"""Observers: exact over ranks, resumable, and without any trace in what they observe."""

import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ranks
import torch
from bare_trainer import bare_trainer
from conftest import write_beton, write_card
from torch import nn

from fastssl import dist, hooks
from fastssl.config import Data, Log, Optim, Run
from fastssl.files.datacard import DataCard
from fastssl.kernels.augment import View
from fastssl.log import read

N, DIM, CLASSES = 64, 12, 3


def trainer(backbone=None, **data):
    backbone = backbone or nn.Identity()
    backbone.dim = getattr(backbone, "dim", DIM)
    run = Run(method=None, data=Data(train="train.beton", **data), optim=Optim(batch=16))
    loader = SimpleNamespace(
        classes=list("rgb"),
        card=DataCard(samples=9, bytes=0, max_pixels=1, label="int"),
        path="train.beton",
        labels=lambda: np.arange(9) % 3,
    )
    return bare_trainer(run, loader, backbone=backbone)


def steps(count):
    g = torch.Generator().manual_seed(0)
    for _ in range(count):
        label = torch.randint(-1, CLASSES, (N,), generator=g)  # some unlabelled
        x = torch.randn(N, DIM, generator=g) + torch.nn.functional.one_hot(label.clamp(min=0), DIM) * 2
        yield x, label


def observe(hook, count=5):
    """Logged numbers of each step, on this rank's slice of the same global batches."""
    t, seen = trainer(), []
    hook.before_epoch(t)
    share = slice(dist.rank() * N // dist.world(), (dist.rank() + 1) * N // dist.world())
    for x, label in steps(count):
        t.step, t.scalars = t.step + 1, {}
        z = x[share, None] * torch.tensor([1.0, 100.0])[:, None]  # (n, views, D)
        hook.after_step(t, {"features": x[share], "z": z}, SimpleNamespace(label=label[share]))
        seen.append({k: float(v) for k, v in t.scalars.items()})
    return seen


def worker(out: str) -> None:
    from fastssl.log import Log

    dist.init("cpu")
    probe = hooks.LinearProbe()
    results = {"probe": observe(probe), "classifier": probe.state["classifier"], "collapse": observe(hooks.Collapse(1))}
    log = Log(Path(out).parent, every=5, total_steps=2, tensorboard=False)
    for step in (1, 2):
        log.step(step, 0, {"loss": torch.tensor(10.0 * step + dist.rank()), "lr": 0.5})
    log.close()
    if dist.is_main():
        torch.save(results, out)
    dist.shutdown()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    out = tmp_path_factory.mktemp("hooks") / "results.pt"
    return out.parent, ranks.launch(__file__, 2, out)


def test_the_probe_learns_from_the_global_batch(two_ranks):
    probe = hooks.LinearProbe()
    for ours, theirs in zip(observe(probe), two_ranks[1]["probe"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    torch.testing.assert_close(probe.state["classifier"], two_ranks[1]["classifier"], rtol=0, atol=1e-6)
    assert probe.state["classifier"].abs().max() > 0.05


def test_collapse_is_that_of_the_global_batch(two_ranks):
    for ours, theirs in zip(observe(hooks.Collapse(1)), two_ranks[1]["collapse"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9)


def test_the_log_averages_tensors_over_ranks(two_ranks):
    assert [(r["loss"], r["lr"]) for r in read(two_ranks[0])] == [(10.5, 0.5), (20.5, 0.5)]


def test_the_probe_is_batch_norm_and_sgd_on_cross_entropy():
    norm = nn.BatchNorm1d(DIM, affine=False)
    probe, plain = hooks.LinearProbe(lr=0.3, momentum=0.8), nn.Linear(DIM, CLASSES)
    nn.init.zeros_(plain.weight), nn.init.zeros_(plain.bias)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.3, momentum=0.8)
    seen = observe(probe)
    for (x, label), logged in zip(steps(5), seen, strict=True):
        norm.momentum = 0.1 if norm.num_batches_tracked else 1.0  # the first batch's statistics are taken as they are
        norm.train()(x[label >= 0])
        logits = plain(norm.eval()(x) / DIM**0.5)
        loss = nn.functional.cross_entropy(logits, label, ignore_index=-1)
        known = label >= 0
        top1 = 100 * (logits.argmax(1) == label)[known].float().mean()
        assert logged == pytest.approx({"probe_loss": loss.item(), "probe_top1_train": top1.item()}, rel=1e-4)
        sgd.zero_grad(), loss.backward(), sgd.step()
    weights = torch.cat([plain.weight, plain.bias[:, None]], 1).detach()
    torch.testing.assert_close(probe.state["classifier"], weights, rtol=1e-4, atol=1e-5)


def test_the_probe_continues_where_it_was(tmp_path):
    """Through the same file format as a checkpoint, which refuses anything but tensors and numbers."""
    whole, first, second = hooks.LinearProbe(), hooks.LinearProbe(), hooks.LinearProbe()
    data = list(steps(4))

    def run(probe, batches):
        t = trainer()
        probe.before_epoch(t)
        for x, label in batches:
            probe.after_step(t, {"features": x}, SimpleNamespace(label=label))

    run(whole, data)
    run(first, data[:2])
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    run(second, data[2:])
    assert set(whole.state) == {"classifier", "buffer", "mean", "variance"}
    addresses = {name: value.data_ptr() for name, value in first.state.items()}
    first.load_state_dict(whole.state_dict())  # in place
    run(first, data[2:])
    assert addresses == {name: value.data_ptr() for name, value in first.state.items()}
    assert all(torch.equal(value, second.state[name]) for name, value in whole.state.items())
    assert hooks.LinearProbe().state_dict() == {}


def test_the_probe_survives_overflow_and_gives_no_gradient():
    probe, t = hooks.LinearProbe(), trainer()
    probe.before_epoch(t)
    x = torch.randn(4, DIM, requires_grad=True)
    with torch.no_grad():
        x[1] = torch.inf
    probe.after_step(t, {"features": x}, SimpleNamespace(label=torch.tensor([0, 1, 2, 0])))
    assert all(value.isfinite().all() and not value.requires_grad for value in probe.state.values())
    assert probe.state["classifier"].abs().max() > 0
    assert x.grad is None


def test_a_batch_without_labels_leaves_the_statistics_of_the_probe():
    probe, t = hooks.LinearProbe(), trainer()
    probe.before_epoch(t)
    x, label = next(steps(1))
    probe.after_step(t, {"features": x}, SimpleNamespace(label=label))
    before = {name: probe.state[name].clone() for name in ("mean", "variance")}
    probe.after_step(t, {"features": x}, SimpleNamespace(label=torch.full_like(label, -1)))
    assert all(torch.equal(probe.state[name], value) for name, value in before.items())
    assert all(value.isfinite().all() for value in probe.state.values())


def test_missing_labels_raise_before_training():
    t = trainer()
    t.loader.classes = None
    with pytest.raises(ValueError, match=r"has none; set log\.probe=False"):
        hooks.LinearProbe().before_epoch(t)


def test_collapse_measures_at_full_and_no_spread():
    torch.manual_seed(0)
    same = torch.ones(400, 32) * torch.rand(400, 1)
    assert hooks.normalized_std(same) < 1e-6 and hooks.effective_rank(hooks.gram(same, 512)) == pytest.approx(
        1, abs=1e-4
    )
    wide = torch.randn(4000, 32)
    assert hooks.normalized_std(wide) == pytest.approx(1, abs=0.02)
    assert 30 < hooks.effective_rank(hooks.gram(wide, 512)) <= 32
    plane = torch.randn(400, 2) @ torch.randn(2, 32)
    assert 1.5 < hooks.effective_rank(hooks.gram(plane, 512)) < 2.01


def test_collapse_takes_q_where_there_is_no_z():
    x = torch.randn(9, DIM, generator=torch.Generator().manual_seed(0))
    seen = []
    for out in ({"q": 1 + x}, {"z": 1 + x, "q": x}, {"z": x}):
        t = trainer()
        hooks.Collapse(1).after_step(t, {"features": x, **out}, None)
        seen.append(float(t.scalars["embedding_std"]))
    assert seen[0] == seen[1] != seen[2] == float(t.scalars["feature_std"])


def test_the_gram_matrix_has_as_many_rows_from_each_rank(monkeypatch):
    monkeypatch.setattr(dist, "world", lambda: 2)
    monkeypatch.setattr(dist, "gather", lambda x: torch.cat([x, x]))
    x = torch.randn(20, 3)
    half = x[:4].double()
    torch.testing.assert_close(hooks.gram(x, 8), 2 * half.T @ half)
    assert hooks.gram(x, 1).shape == (2, 2)  # one row of each


def test_values_that_are_not_finite_have_no_rank():
    assert hooks.effective_rank(torch.full((2, 2), torch.nan)).isnan()


def test_images_of_a_pass_have_the_pixels_of_128_of_224():
    assert [hooks.images_per_pass(size) for size in (448, 224, 112, 32)] == [128, 128, 512, 2048]


def test_intervals_and_neighbours_of_zero_are_refused():
    for make in (lambda: hooks.KnnMonitor(0), lambda: hooks.KnnMonitor(1, k=0), lambda: hooks.Collapse(0)):
        with pytest.raises(ValueError, match="must be 1 or more"):
            make()


def test_effective_rank_is_rankme():
    torch.manual_seed(0)
    for shape in ((20, 50), (50, 20)):
        x = torch.randn(shape) * torch.rand(shape[1])
        p = torch.linalg.svdvals(x.double())
        p = p / p.sum()
        assert hooks.effective_rank(hooks.gram(x, 512)) == pytest.approx(float((-(p * p.log()).sum()).exp()), rel=1e-6)


def test_eigenvalues_are_computed_by_one_thread(monkeypatch):
    def eigvalsh(x, solve=torch.linalg.eigvalsh):
        assert torch.get_num_threads() == 1
        return solve(x)

    threads = torch.get_num_threads()
    monkeypatch.setattr(torch.linalg, "eigvalsh", eigvalsh)
    torch.set_num_threads(2)
    try:
        hooks.effective_rank(torch.eye(3))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_collapse_takes_view_0_every_n_steps():
    seen = observe(hooks.Collapse(2), 4)
    assert [set(s) for s in seen] == [set(), {"feature_std", "feature_rank", "embedding_std", "embedding_rank"}] * 2
    assert seen[1]["embedding_std"] == pytest.approx(seen[1]["feature_std"])


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """30 flat colours in three classes that pixels tell apart, and a card."""
    rng = np.random.default_rng(0)
    colours = np.eye(3)[np.arange(30) % 3] * 200 + rng.integers(0, 50, (30, 3))
    images = [np.full((8, 8, 3), c, np.uint8) for c in colours]
    path = write_beton(tmp_path_factory.mktemp("hooks") / "colours.beton", images, [i % 3 for i in range(30)])
    return str(write_card(path, images, list("rgb")))


class Net(nn.Module):
    dim = 3

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.norm(x)).mean((2, 3))


def test_the_knn_monitor_separates_classes_and_changes_no_state(labelled):
    net = Net().train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    t = trainer(net, bank=labelled, test=labelled, views=(View(size=8),))
    found = hooks.from_config(Run(method=None, log=Log(knn_epochs=2, probe=True, collapse_every=3)))
    assert [type(h).__name__ for h in found] == ["KnnMonitor", "LinearProbe", "Collapse"]
    state = torch.get_rng_state()
    for hook in found:
        hook.before_epoch(t)
    colours = torch.eye(3).repeat(5, 1) * 3
    for _ in range(20):
        found[1].after_step(t, {"features": colours - 1}, SimpleNamespace(label=torch.arange(15) % 3))
    for t.epoch, t.step in ((0, 10), (1, 20)):
        t.scalars = {}
        for hook in found:
            hook.after_epoch(t)
        assert t.scalars == ({} if t.epoch == 0 else {"knn_top1": 100.0, "probe_top1": 100.0})
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in net.modules())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert len(found[0].cache._loaders) == 1  # the probe uses the features that kNN made
    for hook in found[:2]:
        kept = weakref.ref(found[0].cache(t, labelled)[0])
        hook.before_epoch(t)
        assert kept() is None, "features of the last epoch take memory in this one"
    probe = hooks.LinearProbe(2)
    probe.before_epoch(t)
    probe.after_epoch(t)  # the epoch had no steps
    assert "mean" not in probe.state


def test_without_a_test_file_the_bank_is_left_one_out(labelled):
    t = trainer(Net(), bank=labelled, views=(View(size=8),))
    t.epoch, t.step = 4, t.total_steps  # not a multiple of 2, but the end
    monitor = hooks.KnnMonitor(2, k=100)  # more neighbours than there are
    monitor.before_epoch(t)
    monitor.after_epoch(t)
    assert t.scalars["knn_top1"] > 90


def test_the_monitor_needs_one_class_per_image(beton, tmp_path):
    several = write_beton(
        tmp_path / "multi.beton", [np.zeros((8, 8, 3), np.uint8)] * 3, list(np.eye(3, dtype=np.float32))
    )
    write_card(several, [np.zeros((8, 8, 3), np.uint8)] * 3, list("abc"), "multi")
    for path, message in ((beton, "has no classes: kNN and the probe need"), (several, "has several labels per image")):
        with pytest.raises(ValueError, match=message):
            hooks.KnnMonitor(1).before_epoch(trainer(Net(), bank=str(path), views=(View(size=8),)))


def test_no_more_neighbours_than_there_are(labelled, monkeypatch):
    used, knn = [], hooks.knn.knn
    monkeypatch.setattr(hooks.knn, "knn", lambda *sets, k, temperature: (used.append(k), knn(*sets, k=k))[1])
    for data in ({}, {"test": labelled}):
        t = trainer(Net(), bank=labelled, views=(View(size=8),), **data)
        monitor = hooks.KnnMonitor(1, k=100)
        monitor.before_epoch(t)
        monitor.after_epoch(t)
    assert used == [(29,), (30,)]  # of 30 images: without a test file each has the others


if __name__ == "__main__":
    worker(*sys.argv[1:])
