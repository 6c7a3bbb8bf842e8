"""PCA-whitening of the rows of all ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl import dist
from fastssl.clustering.rows import blocks


def pca_whiten(x: Tensor, dims: int) -> Tensor:
    """(n_r, D) rows of this rank -> (n_r, dims) projections on the first principal components of the rows of all ranks,
    each with variance 1 (N - 1 in the denominator).

    The largest entry of a component is positive.  Components with less than 1e-6 of the first one's variance are zero.
    ValueError for more components than there are.
    """
    n = int(dist.sum_(torch.tensor(len(x), device=x.device)))
    if not 0 < dims <= min(n, x.shape[1]):
        raise ValueError(
            f"method.pca_dim={dims}: {n} features of {x.shape[1]} dimensions have 1 to {min(n, x.shape[1])} "
            "components; 0 switches it off"
        )
    mean = (dist.sum_(x.sum(0, dtype=torch.float64)) / n).to(x.dtype)
    scatter_DD = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for part in blocks(x, x.shape[1]):
        centred = part - mean
        scatter_DD += centred.T @ centred
    values, vectors = torch.linalg.eigh(dist.sum_(scatter_DD) / max(n - 1, 1))
    values, vectors = values.flip(0)[:dims], vectors.flip(1)[:, :dims]
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    scale = torch.where(values > 1e-6 * values[0], values.clamp(min=1e-300).rsqrt(), 0.0)
    project = dist.broadcast_((vectors * scale).contiguous()).to(x.dtype)
    return torch.cat([(part - mean) @ project for part in blocks(x, x.shape[1])])
