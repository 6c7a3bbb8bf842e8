"""Softmax regression: the loss and its gradient in closed form, for all linear classifiers."""

from __future__ import annotations

import torch
from torch import Tensor


def loss_and_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The cross entropy (B, ...) of each row of logits (B, ..., C) and its gradient by the logits, softmax - one-hot;
    labels (B,)."""
    log_p = logits.log_softmax(-1)
    column = labels.view(-1, *[1] * (logits.ndim - 1))
    loss = -log_p.gather(-1, column.expand(*logits.shape[:-1], 1))[..., 0]
    one_hot = torch.arange(logits.shape[-1], device=logits.device) == column
    # not scatter_add_, for which CUDA waits with deterministic algorithms, so that it could not be captured
    return loss, log_p.exp_().add_(one_hot, alpha=-1)
