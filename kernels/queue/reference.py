"""The definition of the circular write in plain PyTorch."""

import torch
from torch import Tensor

from ..common import l2_normalize


def enqueue_(queue: Tensor, pointer: Tensor, rows: Tensor, normalize: bool, found_inf: Tensor | None) -> None:
    size, n = queue.shape[0], rows.shape[0]
    kept = rows.detach()[-size:]
    if normalize:
        kept = l2_normalize(kept)
    slots = (pointer.view(()) + torch.arange(n - kept.shape[0], n, device=queue.device)) % size
    kept = kept.to(queue.dtype)
    if found_inf is not None:
        kept, n = torch.where(found_inf != 0, queue[slots], kept), torch.where(found_inf != 0, 0, n)
    queue[slots] = kept
    pointer.add_(n).remainder_(size)
