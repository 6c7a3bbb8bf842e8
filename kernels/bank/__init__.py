"""A memory bank of one row per sample (NPID, ODC): momentum update of the rows of a batch, and means by label."""

import torch
from torch import Tensor

from ..common import Impl, check_rows, check_triton_dtype, choose
from . import reference


def update_bank_(
    bank: Tensor, index: Tensor, rows: Tensor, momentum: float, *, found_inf: Tensor | None = None, impl: Impl = "auto"
) -> Tensor:
    """bank[i] = normalize((1 - momentum) bank[i] + momentum row) for i in index (B,), in place; returns bank (S, D).

    An index that occurs more than once uses its last row only.  A row that becomes zero stays zero.  No gradient.
    Indices must be in [0, S): the Triton kernel ignores others, since a check would have to wait for the device.
    found_inf: None, or a 0-dim float32 tensor on the device; if it is not zero, nothing changes.
    """
    check_rows("update_bank_", bank=bank, rows=rows)
    _check_index("update_bank_", index, (rows.shape[0],), bank)
    if not 0 <= momentum <= 1:
        raise ValueError(f"update_bank_: momentum={momentum}: must be in [0, 1] (the weight of the new row)")
    if rows.shape[0] == 0:
        return bank
    with torch.no_grad():
        if choose(impl, bank) == "reference":
            reference.update_bank_(bank, index, rows, momentum, found_inf)
        else:
            check_triton_dtype("update_bank_", bank=bank, rows=rows)
            from . import triton

            triton.update_bank_(bank, index, rows, float(momentum), found_inf)
    return bank


def update_centroids_(centroids: Tensor, bank: Tensor, labels: Tensor, *, impl: Impl = "auto") -> Tensor:
    """centroids[k] = mean of the bank's rows with label k, in place, unchanged if there are none; returns (K, D).

    bank (S, D); labels (S,): int64 in [0, K), or negative for rows without a centroid.  Sums are float32 in the order
    of the rows, so the result does not change from run to run.
    """
    check_rows("update_centroids_", centroids=centroids, bank=bank)
    _check_index("update_centroids_", labels, (bank.shape[0],), bank)
    if bank.shape[0] == 0 or centroids.shape[0] == 0:
        return centroids
    with torch.no_grad():
        if choose(impl, bank) == "reference":
            reference.update_centroids_(centroids, bank, labels)
        else:
            check_triton_dtype("update_centroids_", centroids=centroids, bank=bank)
            from . import triton

            triton.update_centroids_(centroids, bank, labels)
    return centroids


def _check_index(op: str, index: Tensor, shape: tuple, bank: Tensor) -> None:
    if index.dtype != torch.int64 or index.shape != shape or index.device != bank.device:
        raise ValueError(
            f"{op}: the index is {index.dtype} {tuple(index.shape)} on {index.device}: "
            f"expected int64 {shape} on {bank.device}"
        )
