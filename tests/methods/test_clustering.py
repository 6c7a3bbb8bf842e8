"""Methods with a memory of the whole training set: their losses in float64, their banks, labels and sampling orders."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import method_cases as cases
import numpy as np
import pytest
import torch
from test_losses import D, N, Tiny, array, batch, build, close, log_softmax, rows, unit

# ---- NPID ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
def test_npid_tells_a_samples_own_row_from_its_negatives(shared):
    method = build("npid", dims=(D,), negatives=10, temperature=0.3, shared=shared, ensure_neg=False)
    z, some = rows(N, D), batch(epoch=3, step=2)
    some.index = torch.tensor([59, 3, 7, 20, 0, 41])
    negatives = array(method.draw_shared(some) if shared else method.draw(some))
    assert negatives.shape == ((10,) if shared else (N, 10))
    bank, want = array(method.bank), 0.0
    for i, q in enumerate(unit(array(z))):
        others = bank[negatives if shared else negatives[i]]
        want -= log_softmax(np.concatenate([[q @ bank[some.index[i]]], others @ q]) / 0.3)[0] / N
    close(method.loss({"z": z}, some)["loss"], want)


def test_npid_draws_by_sample_and_epoch():
    method = build("npid", dims=(D,), negatives=4001, ensure_neg=False)
    whole = method.draw(SimpleNamespace(index=torch.arange(8), epoch=3))
    again = method.draw(SimpleNamespace(index=torch.tensor([5, 2]), epoch=3))
    assert torch.equal(again, whole[[5, 2]])
    assert not torch.equal(method.draw(SimpleNamespace(index=torch.arange(8), epoch=4)), whole)
    counts = torch.bincount(whole.flatten(), minlength=60)
    assert counts.shape == (60,) and (counts - 8 * 4001 / 60).abs().max() < 6 * (8 * 4001 / 60) ** 0.5


@pytest.mark.parametrize("shared", [False, True])
def test_ensure_neg_leaves_out_the_positives_and_nothing_else(shared):
    method = build("npid", dims=(D,), negatives=20_000, ensure_neg=True, shared=shared)
    some = batch()
    some.index = torch.tensor([59, 3, 4, 20, 0, 41])
    drawn = method.draw_shared(some) if shared else method.draw(some)
    for i, one in enumerate(some.index):
        mine, out = (drawn, some.index) if shared else (drawn[i], one[None])
        counts = torch.bincount(mine, minlength=60)
        expected = 20_000 / (60 - len(out))
        assert counts.shape == (60,) and counts[out].sum() == 0
        counts[out] = round(expected)
        assert (counts - expected).abs().max() < 6 * expected**0.5, "uniform over all others"
    later = SimpleNamespace(index=some.index, epoch=0, step=1)
    assert not shared or not torch.equal(method.draw_shared(later), drawn)


def test_npid_mixes_new_embeddings_into_the_bank():
    method = build("npid", dims=(D,), momentum=0.25)
    before, z = array(method.bank).copy(), rows(N, D).detach()
    some = SimpleNamespace(index=torch.tensor([9, 3, 7, 20, 0, 41]))
    method.after_step({"z": z}, some, 0.5)
    want = before.copy()
    want[some.index] = unit(0.75 * before[some.index] + 0.25 * unit(array(z)))
    np.testing.assert_allclose(array(method.bank), want, rtol=0, atol=1e-12)


def test_npid_needs_something_to_be_negative():
    for settings, samples, left in (({"shared": False}, 1, 1), ({"shared": True}, 8, 8)):
        with pytest.raises(ValueError, match=f"data.train has {samples} samples and none is left beside the {left} "):
            cases.config("npid", **settings).build(Tiny(), samples=samples, classes=None, batch=8)


# ---- DeepCluster -----------------------------------------------------------------------------------------------------


def groups(samples=60, dim=8):
    """Features in five groups, and which group each is in."""
    group = torch.arange(samples) % 5
    noise = torch.randn(samples, dim, generator=torch.Generator().manual_seed(2))
    return (5 * torch.eye(dim)[group] + 0.01 * noise).double(), group


def test_deepcluster_labels_are_clusters_and_the_head_starts_anew():
    method = build("deepcluster", clusters=5, pca=4, sampling="all", reweight=0.5)
    x, group = groups()
    x, group = x[:50], torch.cat([group[:48], torch.tensor([0, 0])])  # clusters of different sizes
    x[48:] = x[0]
    method.labels = method.labels[:50]
    shuffled = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    before = method.head.weight.clone()
    note = method.before_epoch(0, lambda name: {"features": (x[shuffled], shuffled)}[name])
    assert note == "5 clusters, 0 empty, the others of 9 to 12 samples"
    pairs = set(zip(method.labels.tolist(), group.tolist()))
    assert len(pairs) == 5, "each cluster is a group, sample by sample"
    sizes = np.bincount(method.labels)
    np.testing.assert_allclose(array(method.weights), sizes**-0.5 / (sizes**-0.5).sum(), rtol=1e-6)
    assert not torch.equal(method.head.weight, before) and method.head.bias.abs().max() == 0
    assert abs(method.head.weight.std() - 0.01) < 0.003
    assert method.order(0) is None

    logits = rows(N, 5)
    want = torch.nn.functional.cross_entropy(logits, method.labels[:N], weight=method.weights)
    torch.testing.assert_close(method.loss({"logits": logits}, batch())["loss"], want)


def test_deepcluster_draws_clusters_equally_often():
    method = build("deepcluster", clusters=5, pca=0)
    method.labels.copy_(torch.tensor([0] * 40 + [3] * 20))
    assert np.bincount(method.labels[method.order(2)]).tolist() == [30, 0, 0, 30]
    assert torch.equal(method.weights, torch.full((5,), 0.2).double())


def continued(name, folder, monkeypatch):
    """Final state of a run over two epochs and a half, and of its continuation from inside the second epoch."""
    from fastssl import dist, engine, state

    dist.init("cpu")
    monkeypatch.setattr(engine, "Loader", cases.Memory)
    run = cases.run(name, steps=10)
    run.log = replace(run.log, root=str(folder), checkpoint_steps=1, keep=99, collapse_every=0)
    run.name = "run"
    whole = state.whole(engine.fit(run, device="cpu").method)
    for step in range(7, 11):
        shutil.rmtree(folder / "run" / "checkpoints" / f"step_{step:08d}")
    t = engine.fit(run, resume=True, device="cpu")
    assert t.step == 10
    return whole, state.whole(t.method)


@pytest.mark.parametrize("name", ["deepcluster"])
def test_a_run_killed_inside_an_epoch_continues_to_the_same_bits(name, tmp_path, monkeypatch):
    whole, resumed = continued(name, tmp_path, monkeypatch)
    for key, value in whole.items():
        assert torch.equal(resumed[key], value), key


@pytest.mark.parametrize("name", ["deepcluster"])
def test_more_clusters_than_the_data_has(name):
    with pytest.raises(ValueError, match=r"method.clusters=61 .* 60 samples of data.train: set method.clusters to at"):
        build(name, clusters=61)


def test_deepcluster_settings_that_do_not_exist():
    for settings, match in (({"algorithm": "dbscan"}, "method.algorithm='dbscan' is none of kmeans, pic, faiss"),
                            ({"sampling": "some"}, "method.sampling='some'"), ({"pca": 9}, "method.pca=9 is more")):
        with pytest.raises(ValueError, match=match):
            build("deepcluster", **{"clusters": 5, "pca": 4, **settings})
