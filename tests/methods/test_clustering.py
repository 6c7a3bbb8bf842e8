"""Methods with a memory bank or pseudo-labels: losses in float64, banks, labels, sampling."""

from types import SimpleNamespace

import method_cases as cases
import numpy as np
import pytest
import torch
from loss_tools import D, N, Tiny, array, batch, build, close, log_softmax, rows, unit

from fastssl.config import validate
from fastssl.sharded_table import ShardedTable
from fastssl.trainer import Context


@pytest.mark.parametrize("shared", [False, True])
def test_npid_loss_equals_the_formula(shared):
    method = build("npid", dims=(D,), negatives=10, temperature=0.3, shared=shared, ensure_neg=False)
    z, some = rows(N, D), batch(epoch=3, step=2)
    some.index = torch.tensor([59, 3, 7, 20, 0, 41])
    negatives = array(method.draw_shared_negatives(some) if shared else method.draw_negatives(some))
    assert negatives.shape == ((10,) if shared else (N, 10))
    bank, want = array(method.bank), 0.0
    for i, q in enumerate(unit(array(z))):
        others = bank[negatives if shared else negatives[i]]
        want -= log_softmax(np.concatenate([[q @ bank[some.index[i]]], others @ q]) / 0.3)[0] / N
    close(method.loss({"z": z}, some)["loss"], want)


def test_npid_negatives_depend_on_sample_and_epoch():
    method = build("npid", dims=(D,), negatives=4001, ensure_neg=False)
    whole = method.draw_negatives(SimpleNamespace(index=torch.arange(8), epoch=3))
    again = method.draw_negatives(SimpleNamespace(index=torch.tensor([5, 2]), epoch=3))
    assert torch.equal(again, whole[[5, 2]])
    assert not torch.equal(method.draw_negatives(SimpleNamespace(index=torch.arange(8), epoch=4)), whole)
    shared = [
        method.draw_shared_negatives(SimpleNamespace(index=torch.arange(8), epoch=e, step=s))
        for e, s in ((3, 5), (4, 5), (3, 6))
    ]
    method.seed += 1
    other = method.draw_negatives(SimpleNamespace(index=torch.arange(8), epoch=3))
    assert len({tuple(row.tolist()) for row in (*whole, *other, *shared)}) == 8 + 8 + 3, "all are different"
    counts = torch.bincount(whole.flatten(), minlength=60)
    assert counts.shape == (60,) and (counts - 8 * 4001 / 60).abs().max() < 6 * (8 * 4001 / 60) ** 0.5


@pytest.mark.parametrize("shared", [False, True])
def test_npid_ensure_neg_excludes_only_the_positives(shared):
    method = build("npid", dims=(D,), negatives=20_000, ensure_neg=True, shared=shared)
    some = batch()
    some.index = torch.tensor([59, 3, 4, 20, 0, 41])
    drawn = method.draw_shared_negatives(some) if shared else method.draw_negatives(some)
    for i, one in enumerate(some.index):
        mine, out = (drawn, some.index) if shared else (drawn[i], one[None])
        counts = torch.bincount(mine, minlength=60)
        expected = 20_000 / (60 - len(out))
        assert counts.shape == (60,) and counts[out].sum() == 0
        counts[out] = round(expected)
        assert (counts - expected).abs().max() < 6 * expected**0.5, "uniform over all others"
    later = SimpleNamespace(index=some.index, epoch=0, step=1)
    assert not shared or not torch.equal(method.draw_shared_negatives(later), drawn)


def test_npid_bank_update_equals_the_formula():
    method = build("npid", dims=(D,), momentum=0.25)
    before, z = array(method.bank).copy(), rows(N, D).detach()
    some = SimpleNamespace(index=torch.tensor([9, 3, 7, 20, 0, 41]))
    method.after_step({"z": z}, some, 0.5)
    want = before.copy()
    want[some.index] = unit(0.75 * before[some.index] + 0.25 * unit(array(z)))
    np.testing.assert_allclose(array(method.bank), want, rtol=0, atol=1e-12)


def test_npid_ensure_neg_with_too_few_samples_raises():
    for settings, samples, left in (({"shared": False}, 1, 1), ({"shared": True}, 8, 8)):
        with pytest.raises(
            ValueError,
            match=f"excludes {left} samples from the negatives, and data.train has {samples}, so none is left",
        ):
            cases.config("npid", **settings).build(Tiny(), Context(samples, batch=8))


@pytest.mark.parametrize("name", ["npid", "odc"])
def test_bank_momentum_of_zero_raises(name):
    with pytest.raises(ValueError, match="method.momentum=0.0, the weight of the new embedding, must be above 0"):
        build(name, momentum=0.0, **({"clusters": 2} if name == "odc" else {}))
    build(name, momentum=1.0, **({"clusters": 2} if name == "odc" else {}))


def groups(samples=60, dim=8):
    """Features in five groups, and which group each is in."""
    group = torch.arange(samples) % 5
    noise = torch.randn(samples, dim, generator=torch.Generator().manual_seed(2))
    return (5 * torch.eye(dim)[group] + 0.01 * noise).double(), group


def test_deepcluster_before_epoch_assigns_clusters_and_resets_the_head():
    method = build("deepcluster", clusters=5, pca_dim=4, sampling="all", reweight=0.5)
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
    head, labels = method.head.weight.clone(), method.labels.clone()
    method.before_epoch(1, lambda name: (x[shuffled], shuffled))
    assert not torch.equal(method.head.weight, head) and not torch.equal(method.labels, labels)
    method.before_epoch(0, lambda name: (x[shuffled], shuffled))
    assert torch.equal(method.head.weight, head) and torch.equal(method.labels, labels)

    logits = rows(N, 5)
    want = torch.nn.functional.cross_entropy(logits, method.labels[:N], weight=method.weights)
    torch.testing.assert_close(method.loss({"logits": logits}, batch())["loss"], want)


def test_deepcluster_uniform_sampling_draws_clusters_equally_often():
    method = build("deepcluster", clusters=5, pca_dim=8)  # of 8 features
    method.labels.copy_(torch.tensor([0] * 40 + [3] * 20))
    assert np.bincount(method.labels[method.order(2)]).tolist() == [30, 0, 0, 30]
    assert method.order(2).tolist() == method.order(2).tolist() != method.order(3).tolist()
    assert torch.equal(method.weights, torch.full((5,), 0.2).double())


@pytest.mark.parametrize(
    "name, settings, most",
    [
        ("deepcluster", {"clusters": 61, "pca_dim": 0}, 60),
        ("odc", {"clusters": 61, "min_cluster_size": 7}, 8),
        ("deepclusterv2", {"clusters": (9, 61)}, 60),
    ],
)
def test_more_clusters_than_samples_raises(name, settings, most):
    with pytest.raises(ValueError, match=f"method.clusters=61 .* 60 samples .* set method.clusters to at most {most}$"):
        build(name, **settings)


def test_deepcluster_invalid_settings_raise():
    for settings, match in (
        ({"algorithm": "dbscan"}, "method.algorithm='dbscan' is not one of kmeans, pic, faiss"),
        ({"sampling": "some"}, "method.sampling='some' is not one of uniform, all"),
        ({"pca_dim": 9}, "method.pca_dim=9 is more than the backbone's 8 features: set at most that, or 0"),
    ):
        with pytest.raises(ValueError, match=match):
            validate(cases.run("deepcluster", **settings))
            build("deepcluster", **{"clusters": 5, "pca_dim": 4, **settings})


def odc(**settings):
    return build("odc", **{"clusters": 4, "dims": (6, D), "min_cluster_size": 3, "dropout": 0.0, **settings})


def set_odc(method, bank, labels):
    method.bank, method.labels = ShardedTable(*bank.shape).double(), labels
    method.bank.load_(bank)
    method.centroids.copy_(torch.stack([bank[labels == k].mean(0) for k in range(4)]).nan_to_num())
    method.recount()


def test_odc_first_epoch_starts_from_kmeans_of_unit_embeddings():
    method = odc(clusters=5)
    x, group = groups(dim=D)
    shuffled = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    assert "5 clusters, 0 empty" in method.before_epoch(0, lambda name: {"z": (x[shuffled], shuffled)}[name])
    np.testing.assert_allclose(array(method.bank.local_rows), unit(array(x)), rtol=1e-12)
    assert len(set(zip(method.labels.tolist(), group.tolist()))) == 5
    for k in range(5):
        torch.testing.assert_close(method.centroids[k], method.bank.local_rows[method.labels == k].mean(0))
    assert method.before_epoch(1, None) is None, "later epochs keep the labels"
    assert len(set(method.order(1))) < 50, "drawn with replacement"


def test_odc_step_equals_the_formulas():
    method = odc(clusters=4, momentum=0.75, centroid_interval=3, min_cluster_size=1)
    x, group = groups(40, D)
    group %= 4
    bank = torch.nn.functional.normalize(x, dim=1)
    set_odc(method, bank.clone(), group.clone())
    logits = rows(N, 4)
    some = SimpleNamespace(index=torch.tensor([7, 3, 7, 20, 0, 31]), epoch=0, step=0)
    weight = array(method.weights)
    logp, own = log_softmax(array(logits)), group[some.index]
    want = -(weight[own] * logp[np.arange(N), own]).sum() / weight[own].sum()
    close(method.loss({"logits": logits}, some)["loss"], want)

    z = rows(N, D, seed=4).detach()
    centroids = array(method.centroids).copy()
    mixed = array(bank).copy()
    for i, row in zip(some.index.tolist(), unit(array(z))):  # of the two rows of sample 7 the last one counts
        mixed[i] = unit(0.25 * array(bank)[i] + 0.75 * row)
    new = (mixed @ centroids.T).argmax(1)
    labels = array(group).copy()
    labels[some.index] = new[some.index]
    method.after_step({"z": z}, some, 0.1)
    np.testing.assert_allclose(array(method.bank.local_rows)[some.index], mixed[some.index], rtol=1e-12)
    assert method.labels.tolist() == labels.tolist() and labels.tolist() != group.tolist()
    close(method.loss({"logits": logits}, some)["changed"], (labels != array(group))[some.index].mean())
    np.testing.assert_allclose(array(method.centroids), centroids, rtol=1e-12)  # every third step
    sizes = np.bincount(labels, minlength=4) + 1e-5
    np.testing.assert_allclose(array(method.weights), sizes**-0.5 / (sizes**-0.5).sum(), rtol=1e-6)

    some.epoch, some.step = 1, 1  # the twelfth step, ten an epoch
    method.after_step({"z": z}, some, 0.2)
    for k in range(4):
        torch.testing.assert_close(method.centroids[k], method.bank.local_rows[method.labels == k].mean(0))


def test_odc_replaces_small_clusters_by_parts_of_the_largest():
    """Cluster 2 has two samples, fewer than three: they move to the nearest cluster, and cluster 0 is split in its
    place."""
    points = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-1.0, 0.0]]).double()
    point_of = torch.tensor([0] * 6 + [1] * 4 + [2] * 4 + [3] * 3 + [2, 3])
    labels = torch.tensor([0] * 10 + [1] * 4 + [3] * 3 + [2, 2])
    method = odc(dims=(6, 2))
    set_odc(method, points[point_of].clone(), labels.clone())
    method.replace_small_clusters()
    got = method.labels
    assert got[17:].tolist() == [1, 3], "each to the most similar centroid"
    assert len(set(got[:6].tolist())) == len(set(got[6:10].tolist())) == 1
    assert {int(got[0]), int(got[6])} == {0, 2}, "cluster 0 was split into its two points"
    assert torch.bincount(got).min() >= 3
    for k in (0, 2):
        torch.testing.assert_close(method.centroids[k], method.bank.local_rows[got == k].mean(0))
    sizes = torch.bincount(got).double() + 1e-5
    torch.testing.assert_close(method.weights, (sizes**-0.5 / (sizes**-0.5).sum()), rtol=1e-6, atol=0)
    before = got.clone()
    method.replace_small_clusters()
    assert torch.equal(method.labels, before), "no cluster is too small any more"


def test_odc_clusters_of_the_smallest_size_stay():
    method = odc(min_cluster_size=15)
    bank, labels = torch.nn.functional.normalize(rows(60, D).detach(), dim=1), torch.arange(60) % 4
    set_odc(method, bank, labels.clone())
    method.replace_small_clusters()
    assert torch.equal(method.labels, labels)


def test_odc_samples_leave_a_small_cluster_although_it_is_the_nearest():
    """Cluster 2 has two equal samples, and cluster 0, which is split in its place, all but one equal."""
    points = torch.tensor([[1.0, 0.0], [0.8, -0.6], [0.0, 1.0], [-0.6, 0.8], [-1.0, 0.0]]).double()
    point_of = torch.tensor([0] * 9 + [1] + [2] * 4 + [4] * 3 + [3] * 2)
    method = odc(dims=(6, 2))
    set_odc(method, points[point_of].clone(), torch.tensor([0] * 10 + [1] * 4 + [3] * 3 + [2] * 2))
    method.replace_small_clusters()
    assert method.labels[17:].tolist() == [1, 1]
    assert torch.bincount(method.labels).tolist() == [5, 6, 5, 3], "each part has at least three samples"


def test_odc_starts_without_small_clusters():
    x = torch.eye(D).double()[torch.tensor([0] * 29 + [1] * 29 + [2] * 2)]
    method = odc(clusters=3)
    note = method.before_epoch(0, lambda name: {"z": (x, torch.arange(60))}[name])
    assert note == "3 clusters, 0 empty, the others of 2 to 29 samples"
    assert torch.bincount(method.labels).tolist() == method.sizes.tolist() and method.sizes.min() >= 3


def test_odc_sums_fit_and_an_empty_cluster_keeps_its_centroid():
    method, bank = odc(), torch.zeros(60, D).double()
    bank[:, 0] = 1  # the sum of all is the largest that there is
    set_odc(method, bank, torch.zeros(60, dtype=torch.int64))
    method.centroids.copy_(rows(4, D).detach())
    before = method.centroids[1:].clone()
    method.update_centroids()
    torch.testing.assert_close(method.centroids[0], bank[0])
    assert torch.equal(method.centroids[1:], before)


def test_odc_incremental_sums_equal_a_recount():
    """Thirty steps with repeated samples, dissolved and split clusters, then a recount."""
    method = odc(centroid_interval=3, min_cluster_size=4).float()
    method.before_epoch(0, lambda name: (groups(dim=D)[0].float(), torch.arange(60)))
    start, sizes = method.labels.clone(), set()
    for step in range(30):
        z = rows(N, D, seed=step).detach().float()
        some = SimpleNamespace(
            index=torch.randint(60, (N,), generator=torch.Generator().manual_seed(step)), epoch=0, step=step
        )
        method.after_step({"z": z}, some, 0.1)
        sizes |= set(torch.bincount(method.labels, minlength=4).tolist())
    assert len(sizes) > 10 and not torch.equal(method.labels, start)
    kept = method.sums.clone(), method.sizes.clone()
    method.recount()
    assert torch.equal(method.sums, kept[0]) and torch.equal(method.sizes, kept[1])
    method.update_centroids()
    for k in range(4):
        torch.testing.assert_close(method.centroids[k], method.bank.local_rows[method.labels == k].mean(0))


def test_two_means_gives_parts_of_at_least_min_size():
    from fastssl import clustering

    outlier = torch.cat([0.001 * torch.arange(9.0)[:, None], torch.tensor([[100.0]])])
    assert clustering.two_means(outlier, 1).sum() == 1
    assert clustering.two_means(outlier, 3).sum() == 5
    assert clustering.two_means(torch.zeros(8, 3), 2).sum() == 4


def test_deepclusterv2_loss_equals_the_formula():
    method = build("deepclusterv2", dims=(4, D), clusters=(3, 7), temperature=0.2)
    method.labels[0], method.labels[1] = torch.arange(60) % 3, torch.arange(60) % 7
    z, some = rows(N, 3, D), batch()
    some.index = torch.tensor([59, 3, 4, 20, 0, 41])
    want = 0.0
    for i, k in enumerate((3, 7)):
        prototypes = array(method.get_buffer(f"prototypes_{i}"))
        for v in range(3):
            logp = log_softmax(array(z)[:, v] @ prototypes.T / 0.2)
            want -= logp[np.arange(N), some.index % k].mean() / 6
    close(method.loss({"z": z}, some)["loss"], want)

    method.after_step({"z": z.detach()}, some, 0.1)
    for v in range(2):
        assert torch.equal(method.memory.local_rows[some.index, v], z.detach()[:, v])
    assert method.memory.local_rows[5].abs().max() == 0


def test_deepclusterv2_clusterings_use_the_crops_in_turn():
    method = build("deepclusterv2", dims=(4, 8), clusters=(5, 5, 5))
    x, group = groups()
    x = torch.nn.functional.normalize(x, dim=1)
    z = torch.stack([x, x.roll(1, 0), x], 1)
    found = {("z", True): (z.flip(0), torch.arange(60).flip(0))}
    method.before_epoch(0, lambda name, augmented, training: found[name, augmented and training])
    assert torch.equal(method.memory.local_rows, z[:, :2])
    for i, of in enumerate((group, group.roll(1), group)):
        assert len(set(zip(method.labels[i].tolist(), of.tolist()))) == 5
        prototypes = method.get_buffer(f"prototypes_{i}")
        torch.testing.assert_close(prototypes.norm(dim=1), torch.ones(5).double())
        nearest = (method.memory.local_rows[:, i % 2] @ prototypes.T).argmax(1)
        assert torch.equal(nearest, method.labels[i])
    assert not torch.equal(method.labels[0], method.labels[2]), "another initialisation for each"
    before = method.labels.clone()
    method.before_epoch(1, None)
    assert not torch.equal(method.labels, before), "another initialisation in each epoch"
    method.memory.load_(x[:6].repeat(10, 1)[:, None].repeat(1, 2, 1))  # equal rows are drawn as centroids
    assert method.before_epoch(2, None).count("5 clusters, 0 empty") < 3, "an empty cluster stays empty"
