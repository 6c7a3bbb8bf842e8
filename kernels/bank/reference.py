"""The definition of the bank's updates in plain PyTorch."""

import torch

from ..common import at_least_float32, l2_normalize


def update_(bank, index, rows, momentum):
    # every occurrence of an index writes what its last one would: equal values, so their order does not matter
    position = torch.arange(index.shape[0], device=index.device)
    last = torch.where(index[:, None] == index, position, -1).amax(1)
    old, new = at_least_float32(bank[index]), at_least_float32(rows.detach()[last])
    bank[index] = l2_normalize((1 - momentum) * old + momentum * new).to(bank.dtype)


def centroids_(centroids, bank, labels):
    k, d = centroids.shape
    dtype = torch.promote_types(bank.dtype, torch.float32)
    slot = torch.where(labels < 0, k, labels)
    total = torch.zeros((k + 1, d), dtype=dtype, device=bank.device).index_add_(0, slot, bank.to(dtype))[:k]
    count = torch.zeros(k + 1, dtype=dtype, device=bank.device).index_add_(0, slot, torch.ones_like(slot, dtype=dtype))
    count = count[:k, None]
    centroids.copy_(torch.where(count > 0, total / count.clamp(min=1), centroids.to(dtype)))
