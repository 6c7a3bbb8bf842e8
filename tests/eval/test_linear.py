"""The linear probe against scikit-learn's logistic regression on real features (digits)."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from fastssl.eval.linear import probe


def run_probe(*data, **options):
    return probe.linear_probe(*data, probe.ProbeOptions(**options))


@pytest.fixture(scope="module")
def digits():
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = torch.tensor(x[order]).float(), torch.tensor(y[order])
    return x[:1200], y[:1200], x[1200:], y[1200:]


def scaled(train, test):
    mean, scale = probe._mean_and_scale(train)
    return [probe._standardised(x, mean, scale)[:, :-1].numpy() for x in (train, test)]


@pytest.fixture(scope="module")
def sklearn_best(digits):
    """Test accuracy of scikit-learn with the penalty chosen on the same held-out tenth."""
    train, y, test, test_y = digits
    x, t = scaled(train, test)
    order = probe.permutation(len(x), 0, 0)
    held, rest = order[:120], order[120:]
    fit = lambda rows, l2: LogisticRegression(C=1 / (l2 * len(rows)), max_iter=3000).fit(x[rows], y[rows])  # noqa: E731
    best = max(probe.PENALTIES, key=lambda l2: fit(rest, l2).score(x[held], y[held]))
    return 100 * fit(order, best).score(t, test_y)


@pytest.mark.parametrize("l2", [1e-4, 1e-3, 1e-2])
def test_lbfgs_finds_sklearns_optimum(digits, l2):
    train, y, test, _ = digits
    x, t = scaled(train, test)
    theirs = LogisticRegression(C=1 / (l2 * len(x)), max_iter=5000, tol=1e-8).fit(x.astype(float), y)
    ones = torch.ones(len(x), 1)
    w = probe._lbfgs(torch.cat([torch.tensor(x), ones], 1), y, (l2, 1.0), 10, 100)[:, 0].numpy()
    logits = theirs.decision_function(t.astype(float)), t @ w[:-1] + w[-1]
    want, ours = (np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in logits)
    np.testing.assert_allclose(ours, want, rtol=0, atol=1e-3)


@pytest.mark.parametrize("solver, options", [("sgd", {}), ("sgd", {"batch": 5000, "epochs": 300}), ("lbfgs", {})])
def test_accuracy_is_within_one_percent_of_sklearns(digits, sklearn_best, solver, options):
    result = run_probe(*digits, solver=solver, **options)
    (row,) = result["results"]
    assert abs(row["top1"] - sklearn_best) <= 1.0, (row, sklearn_best)
    assert row["top1"] < row["top5"] <= 100
    setting = "lr" if solver == "sgd" else "l2"
    best = max(result["selection"], key=lambda r: r["held_out_top1"])
    assert row[setting] == best[setting] and len(result["selection"]) > 4
    assert len({r["held_out_top1"] for r in result["selection"]}) > 1, "the grid matters"


def test_gradient_is_that_of_cross_entropy():
    torch.manual_seed(0)
    w, x, y = torch.randn(6, 3, 4, dtype=torch.double), torch.randn(9, 6, dtype=torch.double), torch.randint(4, (9,))
    w.requires_grad_()
    logits = torch.einsum("nd,dgc->gnc", x, w)
    want = sum(torch.nn.functional.cross_entropy(z, y, reduction="sum") for z in logits)
    (grad,) = torch.autograd.grad(want, w)
    ours = probe._summed_gradient(w.detach(), x, y)
    torch.testing.assert_close(ours[0], want.detach())
    torch.testing.assert_close(ours[1], grad)


def test_classifiers_trained_together_are_those_trained_alone(digits):
    train, y = digits[:2]
    x = probe._standardised(train, *probe._mean_and_scale(train))
    together = probe._sgd(x, y, (0.3, 3.0, 30.0), 10, 5, 256, seed=0)
    for i, rate in enumerate((0.3, 3.0, 30.0)):
        torch.testing.assert_close(together[:, i], probe._sgd(x, y, (rate,), 10, 5, 256, seed=0)[:, 0])


def test_sgd_is_torchs_with_a_cosine_by_steps(digits):
    x, y = probe._standardised(digits[0], *probe._mean_and_scale(digits[0]))[:300].double(), digits[1][:300]
    w = torch.zeros(x.shape[1], 10, dtype=torch.float64, requires_grad=True)
    sgd = torch.optim.SGD([w], lr=3.0, momentum=0.9)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 3 * 3)
    for epoch in range(3):
        for rows in torch.from_numpy(probe.permutation(300, 4, epoch + 1)).split(128):
            sgd.zero_grad()
            torch.nn.functional.cross_entropy(x[rows] @ w, y[rows]).backward()
            sgd.step(), cosine.step()
    ours = probe._sgd(x, y, (3.0,), 10, 3, 128, seed=4)[:, 0]
    torch.testing.assert_close(ours, w.detach(), rtol=1e-9, atol=1e-12)


def test_a_batch_larger_than_the_data_is_all_of_it(digits):
    x, y = probe._standardised(digits[0], *probe._mean_and_scale(digits[0])), digits[1]
    large, whole = (probe._sgd(x, y, (3.0,), 10, 2, batch, seed=0) for batch in (5000, len(x)))
    assert torch.equal(large, whole)


def test_the_seed_decides_everything(digits):
    run = lambda seed: run_probe(*digits, epochs=3, seed=seed)  # noqa: E731
    torch.manual_seed(1)
    first = run(0)
    torch.manual_seed(2)
    assert run(0) == first
    assert run(1)["selection"] != first["selection"]


def test_the_test_set_does_not_affect_the_selection(digits):
    train, y, test, test_y = digits
    one, two = (run_probe(train, y, test, labels, epochs=3) for labels in (test_y, test_y.flip(0)))
    assert one["selection"] == two["selection"] and one["results"][0]["lr"] == two["results"][0]["lr"]
    assert one["results"][0]["top1"] > two["results"][0]["top1"]


def test_features_of_any_scale_and_dead_dimensions(digits):
    train, y, test, test_y = digits
    want = run_probe(train, y, test, test_y, epochs=20)["results"]
    shift = torch.linspace(1, 1e3, 64)
    got = run_probe(train * shift + 5, y, test * shift + 5, test_y, epochs=20)["results"]
    assert got[0]["top1"] == pytest.approx(want[0]["top1"], abs=1.0)
    for rounding in (0.0, 3e-7):
        dead = [torch.cat([x, x.new_full((len(x), 1), c)], 1) for x, c in ((train, 3.0), (test, 1e4))]
        dead[0][::2, -1] += rounding
        assert run_probe(dead[0], y, dead[1], test_y, epochs=20)["results"][0]["top1"] > 90
    assert run_probe(torch.ones(50, 4), y[:50], torch.ones(20, 4), y[:20], epochs=2)["results"][0]["top1"] <= 50


def test_chunks_of_logits_change_nothing(digits, monkeypatch):
    train, y = digits[0][:200], digits[1][:200]
    x = probe._standardised(train, *probe._mean_and_scale(train))
    want = probe._lbfgs(x, y, (1e-3, 1e-2), 10, 20)
    monkeypatch.setattr(probe, "LOGITS", 10 * 33)
    torch.testing.assert_close(probe._lbfgs(x, y, (1e-3, 1e-2), 10, 20), want, rtol=1e-3, atol=2e-4)


def test_one_sample_is_left_to_train_on(digits, monkeypatch):
    train, y, test, test_y = digits
    rows, sgd = [], probe._sgd
    monkeypatch.setattr(probe, "_sgd", lambda x, *rest: (rows.append(len(x)), sgd(x, *rest))[1])
    found = run_probe(train[:30], y[:30], test[:9], test_y[:9], held_out=0.99, epochs=1)
    assert rows == [1, 30]  # 0.99 of 30 rows, rounded, are all of them
    assert found["options"]["batch"] == 30
    rows.clear()
    run_probe(train[:30], y[:30], test[:9], test_y[:9], held_out=0.01, epochs=1)
    assert rows == [29, 30]  # 0.01 of 30 rows, rounded, are none


BAD = [
    ({"solver": "adam"}, "solver='adam'"),
    ({"grid": ()}, r"grid=\(\)"),
    ({"grid": (1.0, -1.0)}, "give positive values"),
    ({"epochs": 0}, "epochs=0"),
    ({"batch": 0}, "batch=0"),
    ({"held_out": 1.0}, "held_out=1.0"),
]


@pytest.mark.parametrize("options, text", BAD, ids=[text for _, text in BAD])
def test_wrong_options_raise(digits, options, text):
    with pytest.raises(ValueError, match=text):
        run_probe(*digits, **options)


def test_unusable_data_raises(digits):
    train, y, test, test_y = digits
    with pytest.raises(ValueError, match="class 9 of the test set is not in the training set"):
        run_probe(train[y < 9], y[y < 9], test, test_y)
    with pytest.raises(ValueError, match="training set: 1 of 1200 features are NaN"):
        run_probe(train.index_fill(0, torch.tensor([4]), float("inf")), y, test, test_y)
    with pytest.raises(ValueError, match="test set: 0 samples"):
        run_probe(train, y, test[:0], test_y[:0])
    with pytest.raises(ValueError, match="has 64 dimensions, the test set 8"):
        run_probe(train, y, test[:, :8], test_y)
    with pytest.raises(ValueError, match="have no label"):
        run_probe(train, y - 1, test, test_y)
    with pytest.raises(ValueError, match="one sample"):
        run_probe(train[:1], y[:1], test[:1], y[:1])
