"""Weighted k-nearest-neighbour classification on frozen features: https://arxiv.org/abs/1805.01978, section 3.4.

A query's class is that of the largest sum of exp(cosine / temperature) over its k nearest bank samples.  Exact: every
distance is computed, in chunks that never hold them all.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl import dist
from fastssl.eval.common.features import check, hits
from fastssl.eval.common.target import EvalTarget, numbers

QUERIES = 1024  # rows of the similarity matrix at a time
SIMILARITIES = 1 << 26  # entries of it at a time: 256 MB
NEEDS = ("train", "test")
K = (10, 20, 100, 200)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--k",
        type=numbers(int),
        help="neighbours that vote; default: 10,20,100,200, of these what the training file has images for",
    )
    parser.add_argument("--temperature", type=float, default=0.07, help="of the votes' weights exp(cosine / T)")
    parser.add_argument("--backend", choices=tuple(SEARCH), default="torch", help="of the search")


def run(target: EvalTarget, args: argparse.Namespace) -> dict:
    bank = target.loader(target.train).samples
    k = args.k or tuple(n for n in K if n <= bank) or (bank,)
    _check(k, args.temperature)  # before the features are computed
    if max(k) > bank:
        raise ValueError(f"--k {max(k)}: must be between 1 and {bank}, the images of {target.train}")
    return knn(
        *target.features(target.train),
        *target.features(target.test),
        k=k,
        temperature=args.temperature,
        backend=args.backend,
    )


@torch.no_grad()
def knn(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    k: tuple[int, ...] = K,
    temperature: float = 0.07,
    backend: str = "torch",
) -> dict:
    """Accuracies in percent for each k, from one pass.  Features (N, dim), (M, dim); labels (N,), (M,).

    Without queries, every bank sample is classified by the others (leave one out).  All ranks hold all rows and each
    classifies its share.  `backend`: "torch" on the device of the features, or "faiss" (a flat index).
    """
    alone = queries is None
    check("bank", bank, bank_labels)
    if alone:
        queries, labels = bank, bank_labels
    check("queries", queries, labels)
    k = tuple(sorted(set(k)))
    _check(k, temperature)
    if k[-1] > len(bank) - alone:
        raise ValueError(f"k={k}: must be between 1 and {len(bank) - alone}, the samples that can be neighbours")
    if bank.shape[1] != queries.shape[1]:
        raise ValueError(f"the bank has {bank.shape[1]} dimensions, the queries {queries.shape[1]}")
    if backend not in SEARCH:
        raise ValueError(f"backend={backend!r}: known are {', '.join(SEARCH)}")

    classes = int(max(bank_labels.max(), labels.max())) + 1
    search = SEARCH[backend](F.normalize(bank.float(), dim=1), k[-1], alone)
    mine = dist.shard(len(queries))
    right = torch.zeros(len(k), 2, dtype=torch.int64, device=bank.device)
    for start in range(mine.start, mine.stop, QUERIES):
        stop = min(start + QUERIES, mine.stop)
        similarity, neighbour = search(F.normalize(queries[start:stop].float(), dim=1), start)
        right += _count(similarity, bank_labels[neighbour], labels[start:stop], k, temperature, classes)
    right = dist.sum_(right.to(dist.device())).tolist()
    rows = [
        {"k": n, "top1": 100 * one / len(queries)} | ({"top5": 100 * five / len(queries)} if classes > 5 else {})
        for n, (one, five) in zip(k, right)
    ]
    options = {
        "temperature": temperature,
        "backend": backend,
        "leave_one_out": alone,
        "bank": len(bank),
        "queries": len(queries),
        "dim": bank.shape[1],
        "classes": classes,
    }
    return {"protocol": "knn", "options": options, "results": rows}


def _check(k: tuple[int, ...], temperature: float) -> None:
    if not k or min(k) < 1:
        raise ValueError(f"k={k}: must be between 1 and the number of samples that can be neighbours")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive")


def _count(similarity: Tensor, found: Tensor, labels: Tensor, k, temperature: float, classes: int) -> Tensor:
    """How many labels are right (first choice, first five) for each k; neighbours (B, max k) come nearest first.

    Classes without a vote fill the first five as they do in the code of DINO, lightly and solo-learn, the lower number
    first; of fewer than five neighbours the first k classes count (DINO, solo-learn).
    """
    weight = ((similarity - similarity[:, :1]) / temperature).exp()  # relative to the nearest: exp(1 / T) may overflow
    out = []
    for n in k:
        votes = weight.new_zeros(len(labels), classes).scatter_add_(1, found[:, :n], weight[:, :n])
        out.append(torch.stack([hits(votes, labels, m).sum() for m in (1, min(5, n))]))
    return torch.stack(out)


def _torch(bank: Tensor, k: int, alone: bool):
    width = max(SIMILARITIES // QUERIES, k)

    def search(queries: Tensor, start: int) -> tuple[Tensor, Tensor]:
        best = queries.new_empty(len(queries), 0), queries.new_empty(len(queries), 0, dtype=torch.int64)
        for offset in range(0, len(bank), width):
            similarity = _exact_product(queries, bank[offset : offset + width])
            if alone:
                own = torch.arange(start, start + len(queries), device=queries.device) - offset
                inside = ((own >= 0) & (own < similarity.shape[1])).nonzero()[:, 0]
                similarity[inside, own[inside]] = -torch.inf
            value, index = similarity.topk(min(k, similarity.shape[1]), dim=1)
            value, index = torch.cat([best[0], value], 1), torch.cat([best[1], index + offset], 1)
            value, place = value.topk(min(k, value.shape[1]), dim=1)
            best = value, index.gather(1, place)
        return best

    return search


def _exact_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T in full fp32 whatever the training around it switched on; TF32 would reorder close neighbours."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(a.device.type, enabled=False):
            return a @ b.T
    finally:
        torch.set_float32_matmul_precision(before)


def _faiss(bank: Tensor, k: int, alone: bool):
    try:
        import faiss
    except ImportError:
        raise ValueError("backend='faiss' needs faiss: pip install faiss-gpu, or use backend='torch'") from None
    index = faiss.IndexFlatIP(bank.shape[1])
    if bank.is_cuda and faiss.get_num_gpus():
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), bank.device.index or 0, index)
    index.add(bank.cpu().numpy())

    def search(queries: Tensor, start: int) -> tuple[Tensor, Tensor]:
        value, found = (torch.from_numpy(a).to(bank.device) for a in index.search(queries.cpu().numpy(), k + alone))
        if alone:  # drop the query itself; among many exact duplicates it may be absent, then the last goes
            own = found == torch.arange(start, start + len(queries), device=bank.device)[:, None]
            own[~own.any(1), -1] = True
            value, found = (t[~own].view(len(queries), k) for t in (value, found))
        return value, found

    return search


SEARCH = {"torch": _torch, "faiss": _faiss}
