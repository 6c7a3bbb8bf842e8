"""The definition of the circular write in plain PyTorch."""

import torch

from ..common import l2_normalize


def push_(queue, pointer, rows, normalize):
    size, n = queue.shape[0], rows.shape[0]
    kept = rows.detach()[-size:]
    if normalize:
        kept = l2_normalize(kept)
    slots = (pointer.view(()) + torch.arange(n - kept.shape[0], n, device=queue.device)) % size
    queue[slots] = kept.to(queue.dtype)
    pointer.add_(n).remainder_(size)
