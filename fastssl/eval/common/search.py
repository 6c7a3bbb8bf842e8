"""The nearest rows by cosine similarity, exact: kNN, sheets of neighbours and the report use this search."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

QUERIES = 1024  # rows of the similarity matrix at a time
SIMILARITIES = 1 << 26  # entries of it at a time: 256 MB
Backend = Literal["torch", "faiss"]
Search = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]  # (queries, exclude) -> see `nearest`


def nearest(bank: Tensor, queries: Tensor, k: int, *, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cosine similarities (M, k) of queries (M, dim) with their nearest rows of bank (N, dim), nearest first, and these
    rows' numbers, int64 (M, k).  `exclude`: int64 (M,), for each query a row of the bank that is not a neighbour:
    itself.  ValueError if fewer than k rows are left."""
    search, starts = make_search(bank, k), range(0, len(queries), QUERIES)
    parts = [search(queries[i : i + QUERIES], None if exclude is None else exclude[i : i + QUERIES]) for i in starts]
    if not parts:
        return queries.new_empty(0, k), torch.empty(0, k, dtype=torch.int64, device=queries.device)
    similarity, rows = (torch.cat(part) for part in zip(*parts))
    return similarity, rows


def make_search(bank: Tensor, k: int, backend: Backend = "torch") -> Search:
    """`nearest` for at most QUERIES queries at a time: search(queries, exclude)."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}")
    search = BACKENDS[backend](F.normalize(bank.float(), dim=1), k)

    def checked(queries: Tensor, exclude: Tensor | None) -> tuple[Tensor, Tensor]:
        rows = len(bank) - (exclude is not None)
        if k > rows:
            raise ValueError(f"k={k}: must be at most {rows}, the rows that can be neighbours")
        return search(F.normalize(queries.float(), dim=1), exclude)

    return checked


def _torch(bank: Tensor, k: int) -> Search:  # this and `_faiss`: of rows of unit length
    width = max(SIMILARITIES // QUERIES, k)

    def search(queries: Tensor, exclude: Tensor | None) -> tuple[Tensor, Tensor]:
        best = queries.new_empty(len(queries), 0), queries.new_empty(len(queries), 0, dtype=torch.int64)
        for offset in range(0, len(bank), width):
            similarity = _exact_product(queries, bank[offset : offset + width])
            if exclude is not None:
                excluded = exclude - offset
                row = ((excluded >= 0) & (excluded < similarity.shape[1])).nonzero()[:, 0]
                similarity[row, excluded[row]] = -torch.inf
            value, index = similarity.topk(min(k, similarity.shape[1]), dim=1)
            value, index = torch.cat([best[0], value], 1), torch.cat([best[1], index + offset], 1)
            value, column = value.topk(min(k, value.shape[1]), dim=1)
            best = value, index.gather(1, column)
        return best

    return search


def _exact_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T in full fp32 whatever precision the training has set; TF32 would reorder close neighbours."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(a.device.type, enabled=False):
            return a @ b.T
    finally:
        torch.set_float32_matmul_precision(before)


def _faiss(bank: Tensor, k: int) -> Search:
    try:
        import faiss
    except ImportError:
        raise ValueError("backend='faiss' needs faiss: pip install faiss-gpu, or use backend='torch'") from None
    index = faiss.IndexFlatIP(bank.shape[1])
    if bank.is_cuda and faiss.get_num_gpus():
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), bank.device.index or 0, index)
    index.add(bank.cpu().numpy())

    def search(queries: Tensor, exclude: Tensor | None) -> tuple[Tensor, Tensor]:
        found = index.search(queries.cpu().numpy(), k + (exclude is not None))
        value, rows = (torch.from_numpy(part).to(bank.device) for part in found)
        if exclude is not None:  # the query itself; among many exact duplicates it may be absent, then the last goes
            itself = rows == exclude[:, None]
            itself[~itself.any(1), -1] = True
            value, rows = (part[~itself].view(len(queries), k) for part in (value, rows))
        return value, rows

    return search


BACKENDS = {"torch": _torch, "faiss": _faiss}
