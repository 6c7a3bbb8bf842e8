"""Top-k accuracy against torch.topk, with ties and with scores that are not finite."""

import pytest
import torch

from fastssl.eval.common import metrics


def test_in_top_k_breaks_ties_by_class_number():
    scores = torch.tensor([[3.0, 1.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    for n, first, last in ((1, [0], [0]), (2, [0, 2], [0, 1]), (4, [0, 1, 2, 3], [0, 1, 2, 3])):
        for label in range(4):
            got = metrics.in_top_k(scores, torch.tensor([label, label]), n).tolist()
            assert got == [label in first, label in last], "of equal scores the lower class counts"
    g = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(50, 9, generator=g), torch.randint(9, (50,), generator=g)
    for n in (1, 3):
        assert torch.equal(metrics.in_top_k(scores, labels, n), (scores.topk(n).indices == labels[:, None]).any(1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_are_wrong(value):
    scores, labels = torch.eye(8), torch.arange(8)
    assert metrics.accuracy(scores, labels) == {"top1": 100, "top5": 100}
    scores[3, 6] = value
    assert metrics.accuracy(scores, labels) == {"top1": 87.5, "top5": 87.5}
    assert metrics.count_correct(scores.expand(2, 8, 8), labels).tolist() == [[7, 7], [7, 7]]
    assert set(metrics.accuracy(scores[:5, :5], labels[:5])) == {"top1"}
