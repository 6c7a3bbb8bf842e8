"""The definition of the loss over gathered rows in plain PyTorch: stores the gathered negatives."""

import torch
from torch import Tensor

from ..common import at_least_float32, l2_normalize


def gathered_nce(
    q: Tensor, bank: Tensor, positive: Tensor, negatives: Tensor, temperature: float, normalize: bool
) -> Tensor:
    q = l2_normalize(q) if normalize else at_least_float32(q)
    bank = bank.detach()
    y = (q * bank[positive].to(q.dtype)).sum(1, keepdim=True)
    rows = bank[negatives].to(q.dtype)
    others = at_least_float32(q @ rows.T if negatives.ndim == 1 else torch.einsum("nd,nkd->nk", q, rows))
    logits = torch.cat([y, others], 1) / temperature
    return (logits.logsumexp(1) - logits[:, 0]).mean()
