"""kNN against scikit-learn and a brute force in fp64."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from fastssl.eval.common import search
from fastssl.eval.knn import knn


def blobs(n, classes=12, dim=24, spread=2.0, seed=0):
    """Clusters that overlap, so that k and the weights matter."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    y = torch.randint(classes, (n,), generator=g)
    return centres[y] + spread * torch.randn(n, dim, generator=g), y


@pytest.fixture(scope="module")
def data():
    return *blobs(700, seed=1), *blobs(301, seed=2)


def brute(bank, bank_y, queries, y, k, temperature, skip=None):
    """Top-1 and top-5 by definition, one query at a time, fp64."""
    a, b = (t.double().numpy() / np.linalg.norm(t.double().numpy(), axis=1, keepdims=True) for t in (bank, queries))
    classes = int(max(bank_y.max(), y.max())) + 1
    right = np.zeros(2)
    for i, q in enumerate(b):
        similarity = a @ q
        if skip is not None:
            similarity[skip[i]] = -np.inf
        near = np.argsort(-similarity)[:k]
        votes = np.zeros(classes)
        for j in near:
            votes[bank_y[j]] += np.exp((similarity[j] - similarity[near[0]]) / temperature)
        ranking = np.argsort(-votes, kind="stable")
        right += [int(y[i]) in ranking[:1], int(y[i]) in ranking[: min(5, k)]]
    return 100 * right / len(b)


def check(result, *reference, **options):
    for row in result["results"]:
        top1, top5 = brute(*reference, k=row["k"], **options)
        assert (row["top1"], row["top5"]) == (pytest.approx(top1), pytest.approx(top5)), row


@pytest.mark.parametrize("temperature", [0.07, 0.5, 0.03])
@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_knn_equals_brute_force(data, backend, temperature):
    if backend == "faiss":
        pytest.importorskip("faiss")
    result = knn(*data, k=(200, 1, 10, 10, 53), temperature=temperature, backend=backend)
    assert [row["k"] for row in result["results"]] == [1, 10, 53, 200]
    assert len({row["top1"] for row in result["results"]}) > 1, "k matters in this data"
    check(result, *data, temperature=temperature)


@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_without_queries_each_sample_is_classified_by_the_others(data, backend):
    if backend == "faiss":
        pytest.importorskip("faiss")
    bank, y = data[0].clone(), data[1].clone()
    bank[100:110], y[100:110] = (
        bank[100],
        y[100],
    )  # exact duplicates: a query must be left out itself, not its duplicate
    result = knn(bank, y, k=(1, 20), backend=backend)
    check({"results": result["results"][1:]}, bank, y, bank, y, temperature=0.07, skip=range(len(y)))
    assert result["results"][0]["top1"] < 100
    assert knn(bank, y, bank, y, k=(1,), backend=backend)["results"][0]["top1"] > 98, (
        "with itself among the neighbours it is nearly perfect"
    )


@pytest.mark.parametrize("exclude, most", [(None, 6), (torch.arange(6), 5)])
def test_the_search_refuses_more_neighbours_than_rows_that_are_left(exclude, most):
    """It would give the excluded row, or fewer columns."""
    x = torch.randn(6, 4)
    similarity, rows = search.nearest(x, x, most, exclude=exclude)
    assert rows.shape == (6, most) and similarity.isfinite().all()
    assert exclude is None or not (rows == exclude[:, None]).any()
    with pytest.raises(ValueError, match=f"k={most + 1}: must be at most {most}, the rows that can be neighbours"):
        search.nearest(x, x, most + 1, exclude=exclude)


def test_top5_counts_classes_without_a_vote_as_dino_does():
    """Five neighbours of class 7: the first five are 7, 0, 1, 2, 3; with two neighbours the first two."""
    bank, bank_y = torch.eye(10)[:6], torch.tensor([7, 7, 7, 7, 7, 9])
    query = torch.ones(1, 10) - torch.eye(10)[5]
    found = {
        y: [row["top5"] for row in knn(bank, bank_y, query, torch.tensor([y]), k=(2, 5))["results"]]
        for y in (7, 0, 3, 4)
    }
    assert found == {7: [100, 100], 0: [100, 100], 3: [0, 100], 4: [0, 0]}


@pytest.mark.parametrize("k", [1, 15])
def test_knn_equals_sklearn(data, k):
    bank, bank_y, queries, y = data
    theirs = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07))
    score = theirs.fit(bank.double(), bank_y).score(queries.double(), y)
    assert knn(*data, k=(k,))["results"][0]["top1"] == pytest.approx(100 * score)


@pytest.mark.parametrize("queries, similarities", [(10, 10 * 7), (37, 37 * 41), (100, 100 * 699)])
def test_the_result_does_not_depend_on_the_chunk_size(data, monkeypatch, queries, similarities):
    want = knn(*data, k=(5, 40))
    alone = knn(*data[:2], k=(5, 40))
    monkeypatch.setattr(search, "QUERIES", queries)
    monkeypatch.setattr(search, "SIMILARITIES", similarities)
    assert knn(*data, k=(5, 40)) == want
    assert knn(*data[:2], k=(5, 40)) == alone


def test_the_similarity_matrix_is_never_held_whole(monkeypatch):
    sizes = []
    monkeypatch.setattr(search, "SIMILARITIES", 1 << 16)
    monkeypatch.setattr(search, "_exact_product", lambda a, b: sizes.append(len(a) * len(b)) or a @ b.T)
    knn(*blobs(3000), *blobs(1500), k=(10,))
    assert sum(sizes) == 3000 * 1500 and max(sizes) <= 1 << 16


def test_tiny_temperature_does_not_overflow(data):
    nearest = knn(*data, k=(1,))["results"][0]["top1"]
    assert knn(*data, k=(10,), temperature=1e-6)["results"][0]["top1"] == nearest


def test_scale_of_features_and_precision_switches_do_not_matter(data):
    bank, bank_y, queries, y = data
    want = knn(*data, k=(10,))["results"]
    assert knn(bank * 1e4, bank_y, queries * 1e-4, y, k=(10,))["results"] == want
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert knn(*data, k=(10,))["results"] == want
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_collapsed_network_has_chance_accuracy():
    y = torch.arange(100) % 10
    rows = knn(torch.ones(100, 4), y, torch.ones(50, 4), y[:50], k=(1, 100))["results"]
    assert rows[0]["top1"] == rows[0]["top5"] == 10, "one neighbour is one guess"
    assert rows[1]["top1"] == 10 and rows[1]["top5"] == 50


def test_a_class_without_neighbours_is_never_predicted():
    (row,) = knn(torch.eye(4), torch.tensor([0, 0, 1, 1]), torch.eye(4)[:2], torch.tensor([0, 7]), k=(1,))["results"]
    assert (row["top1"], row["top5"]) == (50, 50)


def test_few_classes_have_no_top5():
    x, y = blobs(60, classes=5)
    assert set(knn(x, y, k=(3,))["results"][0]) == {"k", "top1"}


def _nan(x):
    x = x.clone()
    x[17, 3] = float("nan")
    return x


BAD = [
    (lambda d: ((d[0][:9], d[1][:9], *d[2:]), {"k": (5, 10)}), r"k=\(5, 10\): must be between 1 and 9"),
    (lambda d: (d[:2], {"k": (700,)}), "between 1 and 699"),
    (lambda d: (d, {"k": ()}), r"k=\(\)"),
    (lambda d: (d, {"k": (0,)}), r"k=\(0,\)"),
    (lambda d: (d, {"temperature": 0.0}), "temperature=0.0"),
    (lambda d: (d, {"backend": "annoy"}), "backend='annoy'"),
    (lambda d: ((_nan(d[0]), *d[1:]), {}), "bank: 1 of 700 features are NaN or infinite .first: sample 17"),
    (lambda d: ((*d[:2], _nan(d[2]), d[3]), {}), "queries: 1 of 301"),
    (lambda d: ((d[0][:0], d[1][:0], *d[2:]), {}), "bank: 0 samples"),
    (lambda d: ((*d[:2], d[2][:0], d[3][:0]), {}), "queries: 0 samples"),
    (lambda d: ((d[0], torch.full_like(d[1], -1), *d[2:]), {}), "bank: 700 of 700 samples have no label"),
    (lambda d: ((*d[:3], d[3].where(d[3] > 5, -1)), {}), "queries: .* have no label"),
    (lambda d: ((d[0], torch.ones(700, 20), *d[2:]), {}), "multi-label"),
    (lambda d: ((*d[:2], d[2][:, :8], d[3]), {}), "the bank has 24 dimensions, the queries 8"),
    (lambda d: ((d[0], d[1][:5], *d[2:]), {}), "700 features and 5 labels"),
]


@pytest.mark.parametrize("change, text", BAD, ids=[text for _, text in BAD])
def test_unusable_data_is_refused(data, change, text):
    args, options = change(data)
    with pytest.raises(ValueError, match=text):
        knn(*args, **options)
