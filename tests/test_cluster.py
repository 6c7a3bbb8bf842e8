"""K-means, whitening and power iteration clustering against scikit-learn, faiss and hand-made cases (one rank; several
ranks are in tests/methods/test_exact.py), and the orders in which clustered samples are drawn."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

from fastssl import clustering
from fastssl.clustering import k_means, power_iteration


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distances(x, found):
    return float((x - found.centroids[found.labels]).double().square().sum())


def test_kmeans_ends_where_sklearn_ends_from_the_same_start():
    x = normal(1500, 6).double()
    start = k_means._start(x, 20, torch.arange(1500), 1500, 5)
    found = clustering.KMeans(20, iterations=300, seed=5).fit(x)
    theirs = KMeans(20, init=start.numpy(), n_init=1, max_iter=300, tol=0, algorithm="lloyd").fit(x.numpy())
    np.testing.assert_allclose(found.objective, theirs.inertia_, rtol=1e-9)
    assert (found.labels.numpy() == theirs.labels_).all()
    np.testing.assert_allclose(found.objective, distances(x, found), rtol=1e-12)
    assert found.counts.sum() == 1500 and torch.equal(found.counts, torch.bincount(found.labels, minlength=20))


@pytest.mark.parametrize("spherical", [False, True])
def test_a_row_on_the_centroid_of_a_split_cluster_is_nearer_to_one_half(spherical):
    """By far more than a matrix product rounds, which differs with the number of rows that a rank holds."""
    x = torch.nn.functional.normalize(torch.randn(1, 6, dtype=torch.float64), dim=1).repeat(7, 1)
    labels = torch.zeros(7, dtype=torch.int64)
    halves = clustering.KMeans(2, spherical=spherical).update(x, labels, torch.zeros(2, 6, dtype=torch.float64))
    stays, goes = (halves - x[0]).square().sum(1)
    assert stays < 1e-30 and goes > 1e-7


@pytest.mark.parametrize("spherical", [False, True])
def test_kmeans_is_as_good_as_faiss(spherical):
    faiss = pytest.importorskip("faiss")
    x = normal(6000, 16)
    x = torch.nn.functional.normalize(x, dim=1) if spherical else x
    ours = clustering.KMeans(60, seed=1, spherical=spherical).fit(x)
    theirs = faiss.Kmeans(16, 60, niter=20, seed=1, spherical=spherical, max_points_per_centroid=10**7)
    theirs.train(x.numpy())
    centroids = torch.from_numpy(theirs.centroids)
    labels, _ = k_means.assign(x, centroids, spherical)
    reference = float((x - centroids[labels]).double().square().sum())
    assert ours.objective < 1.01 * reference, (ours.objective, reference)
    option = clustering.KMeans(60, seed=1, spherical=spherical, backend="faiss").fit(x)
    np.testing.assert_allclose(option.objective, reference, rtol=1e-4)
    if spherical:
        torch.testing.assert_close(ours.centroids.norm(dim=1), torch.ones(60))


def test_no_cluster_stays_empty():
    far = torch.cat([normal(500, 4) * 0.01, normal(1, 4) + 50])
    start = far[:1].expand(8, -1).contiguous()  # all starts in one place: seven would stay empty
    found = clustering.KMeans(8).update(far, k_means.assign(far, start)[0], start)
    assert len(found.unique(dim=0)) > 1
    duplicates = torch.cat([torch.zeros(300, 2), normal(20, 2)])  # most random starts are one point
    found = clustering.KMeans(12, seed=0, iterations=10).fit(duplicates)
    assert (found.counts > 0).all() and found.counts.sum() == 320


def test_more_clusters_than_samples_raise():
    with pytest.raises(ValueError, match="method.clusters=9 of 1 or more .* 8 samples .* at most 8"):
        clustering.KMeans(9).fit(normal(8, 2))
    with pytest.raises(ValueError, match="method.clusters=5 of 2 or more .* set method.clusters to at most 4"):
        clustering.check_clusters(5, 8, 2)
    with pytest.raises(ValueError, match="backend='fais' is neither"):
        clustering.KMeans(2, backend="fais").fit(normal(8, 2))


def test_whitening_is_sklearns():
    x = (normal(400, 12) @ normal(12, 12, seed=1) + 3).double()
    ours = clustering.pca_whiten(x, 5).numpy()
    theirs = PCA(5, whiten=True, svd_solver="full").fit_transform(x.numpy())
    np.testing.assert_allclose(ours * np.sign((ours * theirs).sum(0)), theirs, rtol=0, atol=1e-9)
    np.testing.assert_allclose(np.cov(ours.T), np.eye(5), atol=1e-9)


def test_whitening_of_a_direction_without_variance_is_zero_and_not_noise():
    x = normal(100, 3).double()
    x = torch.cat([x, x[:, :1] * 2], 1)  # rank 3
    y = clustering.pca_whiten(x, 4)
    assert y[:, 3].abs().max() == 0 and (y[:, :3].var(0) - 1).abs().max() < 1e-9
    with pytest.raises(ValueError, match="method.pca_dim=5: 100 features of 4 dimensions have 1 to 4 components"):
        clustering.pca_whiten(x, 5)


def test_power_iteration_finds_separate_groups_and_joins_singles():
    x = torch.cat([normal(30, 3, seed=i) * 0.1 + torch.eye(3)[i] * 9 for i in range(3)])
    labels = clustering.pic(x, 90, torch.arange(90))
    groups = [set(labels[30 * i : 30 * i + 30].tolist()) for i in range(3)]
    assert not groups[0] & groups[1] and not groups[1] & groups[2] and not groups[0] & groups[2]
    sizes = torch.bincount(labels)
    assert (sizes > 1).all() and (sizes[:-1] >= sizes[1:]).all(), "largest first"
    few = clustering.pic(x, 2, torch.arange(90))
    assert torch.equal(few, torch.where(labels < 2, labels, -1))


def test_steepest_ascent_ends_at_local_maxima():
    """Nodes in a line, v rising to both ends: the middle one climbs its heavier edge."""
    edges = [(0, 1, 1.0), (1, 2, 1.0), (2, 3, 2.0), (3, 4, 1.0)]
    i, j, w = zip(*edges, *((b, a, c) for a, b, c in edges))
    graph = torch.sparse_coo_tensor([i, j], w, (5, 5), dtype=torch.float64, check_invariants=True).coalesce()
    assert power_iteration._peaks(graph, torch.tensor([5.0, 3.0, 1.0, 3.0, 5.0]).double()).tolist() == [0, 0, 1, 1, 1]
    labels = power_iteration._join_singles(torch.tensor([0, 0, 1, 2]), torch.tensor([[1, 3], [0, 2], [3, 1], [2, 0]]))
    assert labels.tolist() == [0, 0, 0, 0], "2 and 3 are alone, and their nearest that is not is 1 and 0"


def test_uniform_order_draws_every_cluster_equally_often():
    labels = np.repeat([0, 1, 2, 4, -1], [600, 250, 40, 60, 50])
    order = clustering.uniform_order(labels, 3, 1)
    assert order.shape == (1000,) and order.dtype == np.int64
    drawn = np.bincount(labels[order], minlength=5)  # a label of -1 would fail
    assert drawn[3] == 0 and (abs(drawn[[0, 1, 2, 4]] - 250) <= 4).all(), drawn
    assert len(np.unique(order[labels[order] == 0])) == drawn[0], "without replacement where there are enough"
    assert len(np.unique(order[labels[order] == 2])) == 40
    assert (abs(np.bincount(labels[order[:500]], minlength=5)[[0, 1, 2, 4]] - 125) < 50).all(), "shuffled"
    assert (clustering.uniform_order(labels, 3, 1) == order).all()
    assert not (clustering.uniform_order(labels, 3, 2) == order).all()


def test_replacement_order_draws_samples_with_replacement():
    order = clustering.replacement_order(5000, 3, 1)
    assert order.min() >= 0 and order.max() < 5000
    assert abs(len(np.unique(order)) / 5000 - (1 - np.exp(-1))) < 0.03


def test_weighted_cross_entropy_is_torchs():
    logits, target = normal(30, 4).double(), torch.arange(30) % 4
    weight = clustering.class_weights(torch.tensor([1, 4, 100, 0]), 0.5, 1e-5)
    want = np.array([1.0, 4.0, 100.0, 0.0]) + 1e-5
    np.testing.assert_allclose(weight, want**-0.5 / (want**-0.5).sum(), rtol=1e-6)
    ours = clustering.weighted_cross_entropy(logits, target, weight)
    torch.testing.assert_close(ours, torch.nn.functional.cross_entropy(logits, target, weight.double()))
    target[::3] = -1
    ours = clustering.weighted_cross_entropy(logits, target, weight)
    torch.testing.assert_close(
        ours, torch.nn.functional.cross_entropy(logits, target, weight.double(), ignore_index=-1)
    )
