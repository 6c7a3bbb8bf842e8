"""The SVM protocols against scikit-learn: decision values, mAP, folds, draws, average precision."""

import numpy as np
import pytest
import torch
from sklearn.datasets import make_classification
from sklearn.metrics import average_precision_score
from sklearn.model_selection import cross_val_score
from sklearn.svm import LinearSVC

from fastssl.eval import svm
from fastssl.eval.svm import cpu, newton
from fastssl.eval.svm.solvers import average_precision


def made(n, dim, seed=0):
    """Unit rows, float32, and +-1 labels that overlap."""
    x, y = make_classification(
        n, dim, n_informative=min(dim, 12), n_redundant=0, weights=[0.8], flip_y=0.1, class_sep=0.7, random_state=seed
    )
    x = np.maximum(x + 0.5, 0) + 1e-3
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32), np.where(y, 1, -1)


def theirs(x, y, cost, tol=1e-10):
    fitted = LinearSVC(C=cost, class_weight={1: 2, -1: 1}, tol=tol, max_iter=500_000, random_state=0).fit(x, y)
    return x @ fitted.coef_[0] + fitted.intercept_[0]


@pytest.mark.parametrize("n, dim", [(150, 200), (400, 30)], ids=["gram", "features"])
def test_decision_values_equal_linear_svcs(n, dim):
    x, y = made(n, dim)
    left_out = np.arange(n) % 5 == 0
    y_FN, weight = np.stack([y, y, -y]), np.stack([np.where(label > 0, 2.0, 1.0) for label in (y, y, -y)])
    weight[1, left_out] = 0
    for cost, b, f in cpu.Rows(x).path(y_FN, weight, (0.5**19, 0.5**8, 0.1, 1.0, 30.0), 1e-8):
        kept = ~left_out
        w = theirs(x[kept], y[kept], cost)
        for mine, want in ((f[0], theirs(x, y, cost)), (f[1, kept], w), (f[2], theirs(x, -y, cost))):
            np.testing.assert_allclose(mine, want, rtol=2e-3, atol=2e-3 * np.abs(want).max(), err_msg=f"cost {cost}")
        assert not b[1, left_out].any(), "rows left out have no effect"


def test_one_batch_and_one_path_end_at_the_same_optimum():
    x, y = made(300, 310)
    K, weight = cpu.Rows(x).operator[0], np.where(y > 0, 2.0, 1.0)
    few = cpu.solve_few(K, y, weight, svm.COSTS, 1e-7)
    e = 2 * np.array(svm.COSTS)[:, None] * weight
    cold = cpu.solve(K, np.zeros((0, 0), np.float32), np.stack([y] * 19), e, 1e-7)
    for i, (_, b, f) in enumerate(cpu.Rows(x).path(y[None], weight[None], svm.COSTS, 1e-7)):
        for other in (few[i], cold[i]):
            np.testing.assert_allclose(other @ K, f[0], rtol=2e-3, atol=2e-3 * np.abs(f).max())
        np.testing.assert_allclose(b[0] @ K, f[0], rtol=1e-3, atol=1e-4 * np.abs(f).max())


def test_the_duality_gap_bounds_the_distance_to_the_optimum():
    x, y = made(200, 210)
    K, e = cpu.Rows(x).operator[0].astype(np.float64), 2.0 * np.where(y > 0, 2, 1)

    def primal(f, b):
        return 0.5 * b @ f + 0.5 * (e * np.maximum(0, 1 - y * f) ** 2).sum()

    f32 = [part.astype(np.float32)[None] for part in (y, e)]
    best = cpu.solve(K.astype(np.float32), np.zeros((0, 0), np.float32), *f32, 1e-7)[0].astype(np.float64)
    b, f = np.zeros((1, 200), np.float32), np.zeros((1, 200), np.float32)
    for _ in range(6):
        now = primal(K @ b[0], b[0].astype(np.float64))
        # dual value at a = e max(0, 1 - y f), computed as in textbooks
        a = e * np.maximum(0, 1 - y * f[0])
        dual = a.sum() - 0.5 * (a * y) @ K @ (a * y) - 0.5 * (a * a / e).sum()
        norm = 0.5 * b[0] @ K @ b[0]
        relative = newton.newton(K.astype(np.float32), np.zeros((0, 0), np.float32), *f32, b, f, 1e-9, 1, 3)[0]
        if norm > 0:
            assert relative * norm == pytest.approx(now - dual, rel=1e-2, abs=1e-4)
            assert now - primal(K @ best, best) <= relative * norm + 1e-4


def data(seed=0, n=(240, 200), classes=4, dim=300):
    """Features, and labels of 1, 0, -1 that depend on them only in part."""
    rng = np.random.default_rng(seed)
    y = (rng.random((sum(n), classes)) < 0.25).astype(np.float32)
    x = (0.25 * y @ rng.normal(size=(classes, dim)) + 2 * rng.normal(size=(sum(n), dim)) + 0.5).clip(0)
    y[rng.random(y.shape) < 0.06] = -1
    parts = x[: n[0]], y[: n[0]], x[n[0] :], y[n[0] :]
    return [torch.from_numpy(np.ascontiguousarray(part, np.float32)) for part in parts]


def test_the_protocol_is_the_published_one():
    """Written again with scikit-learn's cross-validation; difficult images are negatives, then left out."""
    x, y, x_test, y_test = (part.numpy().astype(np.float64) for part in data())
    x, x_test = (part / (np.linalg.norm(part, axis=1, keepdims=True) + 1e-5) for part in (x, x_test))
    costs, aps, chosen = (0.01, 0.5**4, 1.0, 10.0), [], []
    for c in range(4):
        label = np.where(y[:, c] == 1, 1, -1)
        make = lambda cost: LinearSVC(C=cost, class_weight={1: 2, -1: 1}, random_state=0)  # noqa: E731
        cv = [cross_val_score(make(cost), x, label, cv=3, scoring="average_precision").mean() for cost in costs]
        chosen.append(costs[int(np.argmax(cv))])
        scores = make(chosen[-1]).fit(x, label).decision_function(x_test)
        known = y_test[:, c] != -1
        aps.append(by_hand(scores[known], y_test[known, c]))
    for solver in ("fast", "sklearn"):
        result = svm.svm(*data(), costs=costs, solver=solver)
        assert [row["cost"] for row in result["classes"]] == chosen
        assert result["results"][0]["map"] == pytest.approx(100 * np.mean(aps), abs=0.1)
        assert [row["ap"] for row in result["classes"]] == pytest.approx([100 * ap for ap in aps], abs=0.4)
    assert 30 < 100 * np.mean(aps) < 95, "neither chance nor perfect"


def by_hand(scores, truth):
    """VOC: precision at each recall, raised to the best at that recall or above."""
    order = np.argsort(-scores)
    hits = np.cumsum(truth[order] > 0)
    precision, recall = hits / np.arange(1, len(hits) + 1), hits / hits[-1]
    levels = np.unique(recall[recall > 0])
    return np.mean([precision[recall >= level].max() for level in levels])  # as many levels as positives


def test_average_precision_equals_its_definitions():
    rng = np.random.default_rng(0)
    scores, truth = rng.normal(size=(6, 80)), rng.integers(-1, 2, (6, 80))
    mine, steps = (average_precision(scores, truth, interpolated) for interpolated in (True, False))
    for r in range(6):
        known = truth[r] != -1
        assert mine[r] == pytest.approx(by_hand(scores[r, known], truth[r, known]))
        assert steps[r] == pytest.approx(average_precision_score(truth[r, known], scores[r, known]))
        tied = np.round(scores[r], 1)
        assert average_precision(tied[None], truth[r : r + 1], False)[0] == pytest.approx(
            average_precision_score(truth[r, known], tied[known])
        )
    assert (mine > steps).all()
    # right, wrong, right: 1/2 of 1 and 1/2 of 2/3; a difficult one on top changes nothing
    assert average_precision(np.array([[9, 3, 2, 1.0]]), np.array([[-1, 1, 0, 1]]))[0] == pytest.approx(5 / 6)
    assert average_precision(np.array([[3, 2, -1, -5.0]]), np.array([[0, 0, 0, 1]]))[0] == 0.25


def test_low_shot_solvers_agree_and_both_selections_are_reported():
    results = {s: svm.low_shot(*data(), draws=svm.Draws((2, 8), 3), solver=s)["results"] for s in ("fast", "sklearn")}
    for a, b in zip(*results.values()):
        assert (a["shots"], a["selected_on"]) == (b["shots"], b["selected_on"])
        assert a["map"] == pytest.approx(b["map"], abs=0.1) and a["map_std"] == pytest.approx(b["map_std"], abs=0.1)
        assert a["map_min"] <= a["map"] <= a["map_max"]
    rows = results["fast"]
    assert [(r["shots"], r["selected_on"]) for r in rows] == [
        (2, "test"),
        (2, "held-out"),
        (8, "test"),
        (8, "held-out"),
    ]
    assert rows[0]["map"] >= rows[1]["map"] and rows[2]["map"] > rows[0]["map"] + 3
    assert rows == svm.low_shot(*data(), draws=svm.Draws((8, 2), 3))["results"], "the seed decides"
    assert rows != svm.low_shot(*data(), draws=svm.Draws((2, 8), 3, seed=1))["results"]


def test_the_held_out_cost_is_chosen_on_images_that_were_not_drawn(monkeypatch):
    seen, drawn = [], []
    monkeypatch.setattr(svm, "draw", lambda *a, own=svm.draw: drawn.append(own(*a)) or drawn[-1])
    monkeypatch.setattr(svm, "average_precision", lambda scores, truth: seen.append(truth) or np.zeros(len(scores)))
    svm.low_shot(*data(), draws=svm.Draws((2,), 1))
    labels = data()[1].numpy()
    for c, (rows, truth) in enumerate(zip(drawn, seen[1::2])):
        rest = np.delete(np.arange(len(labels)), rows)
        assert (truth[:, rows] == -1).all() and (truth[:, rest] == labels[rest, c]).all() and len(rows) == 8


def test_the_default_tolerance_bounds_the_error():
    """Weights are within 0.3 % of the optimum at every cost: what the duality gap promises."""
    x, y = made(300, 310)
    K, weight = cpu.Rows(x).operator[0].astype(np.float64), np.where(y > 0, 2.0, 1.0)
    exact, default = (cpu.solve_few(K.astype(np.float32), y, weight, svm.COSTS, *more) for more in ((1e-8,), ()))
    norm = lambda b: np.sqrt(np.einsum("ai,ij,aj->a", b, K, b))  # noqa: E731
    assert (norm(default - exact) < 0.0035 * norm(exact)).all()


def test_many_rows_of_few_dimensions_at_large_costs():
    """Thousands of large coefficients that nearly cancel: products in fp32 are not precise enough."""
    x, y = made(4000, 12)
    ((_, _, f),) = cpu.Rows(x).path(y[None], np.where(y > 0, 2.0, 1.0)[None], (100.0,))
    want = LinearSVC(C=100, class_weight={1: 2, -1: 1}, dual=False, tol=1e-9).fit(x, y).decision_function(x)
    np.testing.assert_allclose(f[0], want, atol=5e-3 * np.abs(want).max())
    K = x @ x.T + np.float32(1)  # of rank 13: fp32 does not converge, fp64 does
    b = cpu.solve_few(K[:600, :600].copy(), y[:600], np.where(y[:600] > 0, 2.0, 1.0), (100.0,))[0]
    want = LinearSVC(C=100, class_weight={1: 2, -1: 1}, dual=False, tol=1e-9).fit(x[:600], y[:600])
    np.testing.assert_allclose(b @ K[:600, :600].astype(np.float64), want.decision_function(x[:600]), atol=2e-2)


def test_low_shot_draws_have_the_published_sizes():
    labels = np.array([1] * 10 + [0] * 100 + [-1] * 30)
    rows = svm.draw(labels, 4, 5, np.random.default_rng(0))
    assert np.bincount(labels[rows] + 1, minlength=3).tolist() == [0, 16, 4] and len(set(rows)) == 20
    assert np.bincount(labels[svm.draw(labels, 64, 20, np.random.default_rng(0))]).tolist() == [100, 10]


def test_the_chosen_cost_is_by_the_mean_over_samples():
    ap = np.array([[[50, 90.0]], [[70, 40.0]]])  # (samples, classes, costs)
    held = np.array([[[10, 20.0]], [[10, np.nan]]])[:, :, :1].repeat(2, 2) + np.array([0, 5])
    test, clean = svm._choose(3, ap, held, (0.1, 1.0))
    assert (test["cost"], test["map"], test["map_std"], test["map_min"]) == (1.0, 65.0, 25.0, 40.0)
    assert (clean["cost"], clean["selected_on"]) == (1.0, "held-out")
    ap[1, 0] = 80, 40
    assert svm._choose(3, ap, np.full_like(ap, np.nan), (0.1, 1.0)) == [
        {"shots": 3, "selected_on": "test", "cost": 0.1, "map": 65.0, "map_std": 15.0, "map_min": 50.0, "map_max": 80.0}
    ]


def test_one_label_per_image_is_one_against_all():
    x, _, x_test, _ = data()
    rng = np.random.default_rng(1)
    y, y_test = (torch.from_numpy(rng.integers(0, 3, len(part))) for part in (x, x_test))
    hot, hot_test = (torch.nn.functional.one_hot(part, 3).float() for part in (y, y_test))
    assert svm.svm(x, y, x_test, y_test)["results"] == svm.svm(x, hot, x_test, hot_test)["results"]


BAD = [
    (lambda d: (d[0], d[1][:, :3], *d[2:]), "4 classes, the other set has 3"),
    (lambda d: (d[0], d[1] * 0.5, *d[2:]), "labels must be 1"),
    (lambda d: (d[0][:, :9], *d[1:]), "9 dimensions, the test set 300"),
    (lambda d: (d[0] * torch.nan, *d[1:]), "training set: 240 of 240 features are NaN"),
    (lambda d: (d[0][:0], *d[1:]), "training set: 0 features and 240 labels"),
    (lambda d: (*d[:3], d[3] * torch.tensor([1, 0, 1, 1])), "class 1 has no positive image in the test set"),
    (lambda d: (d[0], torch.full((240,), -1), d[2], torch.zeros(200, dtype=torch.int64)), "240 of 240 samples have no"),
]


@pytest.mark.parametrize("change, text", BAD, ids=[text for _, text in BAD])
def test_unusable_data_is_refused(change, text):
    for protocol in (svm.svm, svm.low_shot):
        with pytest.raises(ValueError, match=text):
            protocol(*change(data()))
