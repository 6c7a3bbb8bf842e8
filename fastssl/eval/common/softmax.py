"""Softmax regression: the loss and its gradient in closed form, for all linear classifiers."""

from __future__ import annotations

from torch import Tensor


def loss_and_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The cross entropy (B, ...) of each row of logits (B, ..., C) and its gradient by the logits, softmax - one-hot;
    labels (B,)."""
    log_p = logits.log_softmax(-1)
    column = labels.view(-1, *[1] * (logits.ndim - 1)).expand(*logits.shape[:-1], 1)
    loss = -log_p.gather(-1, column)[..., 0]
    return loss, log_p.exp_().scatter_add_(-1, column, log_p.new_full(column.shape, -1.0))
