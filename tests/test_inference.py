"""One pass over a file: every rank calls the network equally often, and no row is lost or repeated."""

import numpy as np
import pytest
import torch
from conftest import photo, write_beton

from fastssl.inference import forward_batches
from fastssl.loader import Batch, Loader
from fastssl.sampler import Sampler


def load(path, batch, rank=0, world=1, **options):
    return Loader(path, batch, Sampler(rank=rank, world=world, **options), device="cpu", workers=1)


def in_file_order(path, batch, rank=0, world=1):
    return load(path, batch, rank, world, shuffle=False, drop_last=False)


def run(loader, **options):
    """(step, index, label, output) of each batch, and the number of images in each call of the network."""
    calls = []

    def forward(batch: Batch) -> list[torch.Tensor]:
        assert not torch.is_grad_enabled()
        calls.append(len(batch.index))
        return [batch.pixels.float().mean((1, 2))[:, None], batch.index]

    return [(b.step, b.index, b.label, outputs) for b, outputs in forward_batches(forward, loader, **options)], calls


@pytest.mark.parametrize("batch", [102, 50])
def test_ranks_call_the_network_equally_often(beton, batch):
    """The last batch of 103 images has 1 or 3: with batches of 102 rank 0 has none of it."""
    ranks = [run(in_file_order(beton, batch, rank, 2)) for rank in (0, 1)]
    assert len(ranks[0][1]) == len(ranks[1][1]) == -(-103 // batch) and min(ranks[0][1]) == 1
    assert [step for step, *_ in ranks[0][0]] == [step for step, *_ in ranks[1][0]]
    for rows, _ in ranks:
        assert all(torch.equal(index, seen) and len(mean) == len(index) for _, index, _, (mean, seen) in rows)
    assert sorted(torch.cat([index for rows, _ in ranks for _, index, *_ in rows]).tolist()) == list(range(103))
    if batch == 102:
        step, index, label, (mean, _) = ranks[0][0][-1]
        assert (step, index.shape, label.shape, mean.shape) == (1, (0,), (0,), (0, 1))


def test_labels_of_an_empty_batch_have_the_files_shape(tmp_path):
    labels = [np.float32([1, 0, -1])] * 3
    path = write_beton(tmp_path / "multi.beton", [photo(np.random.default_rng(0), 8, 8)] * 3, labels)
    rows, _ = run(in_file_order(path, 2, rank=0, world=2))
    assert torch.cat([label for _, _, label, _ in rows]).shape == (1, 3)


def test_start_stop_and_order_select_the_rows(beton):
    order = np.arange(103)[::-1].copy()
    rows, calls = run(in_file_order(beton, 20), start=1, stop=3, order=order)
    assert [step for step, *_ in rows] == [1, 2] and calls == [20, 20]
    assert torch.cat([index for _, index, *_ in rows]).tolist() == list(range(82, 42, -1))
    rows, calls = run(load(beton, 20, micro_per_step=2), epoch=3, stop=2)
    assert calls == [10] * 4 and [step for step, *_ in rows] == [0, 0, 1, 1]
