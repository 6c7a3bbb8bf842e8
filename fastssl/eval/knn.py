"""Weighted k-nearest-neighbour classification on frozen features: https://arxiv.org/abs/1805.01978, section 3.4.

A query's class is the one with the largest sum of exp(cosine / temperature) over its k nearest bank samples.  Exact:
every similarity is computed, in chunks (common/search.py).
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from fastssl import dist
from fastssl.eval.common import search
from fastssl.eval.common.features import check_features
from fastssl.eval.common.metrics import in_top_k, percentages, top_ks
from fastssl.eval.common.target import EvalTarget

NEEDS = ("train", "test")
K = (10, 20, 100, 200)


def run(target: EvalTarget, args: argparse.Namespace) -> dict:
    bank_size = target.loader(target.train).samples
    k = args.k or tuple(n for n in K if n <= bank_size) or (bank_size,)
    _check(k, args.temperature, bank_size)  # before the features are computed
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
    backend: search.Backend = "torch",
) -> dict:
    """Top-1 and top-5 accuracy in percent for each number of neighbours in `k`.  bank (N, dim) and bank_labels (N,),
    queries (M, dim) and labels (M,); the search scales features to unit length.

    Without queries, every bank sample is classified by the others (leave one out).  All ranks hold all rows and each
    classifies its shard.  `backend`: "torch" on the device of the features, or "faiss" (a flat index).
    """
    leave_one_out = queries is None
    check_features("bank", bank, bank_labels)
    if queries is None:
        queries, labels = bank, bank_labels
    if labels is None:
        raise ValueError("the queries have no labels: give `labels`, or no queries")
    check_features("queries", queries, labels)
    k = tuple(sorted(set(k)))
    _check(k, temperature, len(bank) - leave_one_out)
    if bank.shape[1] != queries.shape[1]:
        raise ValueError(f"the bank has {bank.shape[1]} dimensions, the queries {queries.shape[1]}")
    find = search.make_search(bank, k[-1], backend)
    classes = int(max(bank_labels.max(), labels.max())) + 1
    correct = torch.zeros(len(k), len(top_ks(classes)), dtype=torch.int64, device=bank.device)
    shard = torch.arange(len(queries), device=bank.device)[dist.shard(len(queries))]
    for rows in shard.split(search.QUERIES):
        similarity, neighbours = find(queries[rows], rows if leave_one_out else None)
        weight = ((similarity - similarity[:, :1]) / temperature).exp()  # relative: exp(1 / temperature) may overflow
        for n, count in zip(k, correct):
            count += _correct(weight[:, :n], bank_labels[neighbours[:, :n]], labels[rows], classes)
    correct = dist.sum_(correct.to(dist.device())).tolist()
    results = [{"k": n, **percentages(count, len(queries))} for n, count in zip(k, correct)]
    options = {
        "temperature": temperature,
        "backend": backend,
        "leave_one_out": leave_one_out,
        "bank": len(bank),
        "queries": len(queries),
        "dim": bank.shape[1],
        "classes": classes,
    }
    return {"protocol": "knn", "options": options, "results": results}


def _check(k: tuple[int, ...], temperature: float, most: int) -> None:
    if not k or min(k) < 1 or max(k) > most:
        raise ValueError(f"k={k}: must be between 1 and {most}, the samples that can be neighbours")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive")


def _correct(weight: Tensor, voted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """For each t of top_ks(classes), how many of the B labels are among the t classes with most votes: int64
    (len(top_ks(classes)),).  weight, voted: (B, n), weight and class of each of the n neighbours.

    Classes without a vote come last, in the order of their numbers, as in the code of DINO, lightly and solo-learn.
    With n < t only the first n classes count (DINO, solo-learn).
    """
    votes = weight.new_zeros(len(labels), classes).scatter_add_(1, voted, weight)
    return torch.stack([in_top_k(votes, labels, min(t, voted.shape[1])).sum() for t in top_ks(classes)])
