"""Top-k accuracy, as all protocols and monitors count it."""

from __future__ import annotations

import torch
from torch import Tensor


def top_ks(classes: int) -> tuple[int, ...]:
    """The k of the reported accuracies: 1, and 5 where there are more than five classes."""
    return (1, 5) if classes > 5 else (1,)


def in_top_k(scores: Tensor, labels: Tensor, k: int) -> Tensor:
    """bool (..., B): is the label among the k best of scores (..., B, C)?  Of equal scores the lower class comes first;
    where a score is NaN or infinite, as those of a classifier that diverged, the answer is no."""
    labels = labels.expand(scores.shape[:-1])[..., None]
    own = scores.gather(-1, labels)
    lower = torch.arange(scores.shape[-1], device=scores.device) < labels
    better = ((scores > own) | ((scores == own) & lower)).sum(-1)
    return (better < k) & scores.isfinite().all(-1)


def count_correct(scores: Tensor, labels: Tensor) -> Tensor:
    """int64 (K, ...): how many labels are right by scores (..., B, C), for each k of top_ks(C)."""
    return torch.stack([in_top_k(scores, labels, k).sum(-1) for k in top_ks(scores.shape[-1])])


def percentages(correct: list[int], samples: int) -> dict[str, float]:
    """{"top1", "top5" where it was counted} in percent, of the counts for each k of top_ks."""
    return {name: 100 * count / samples for name, count in zip(("top1", "top5"), correct)}


def accuracy(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """{"top1", "top5" (more than five classes)} in percent, of scores (B, C) and labels (B,)."""
    return percentages(count_correct(scores, labels).tolist(), len(labels))
