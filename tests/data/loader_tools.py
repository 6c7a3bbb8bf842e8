"""A loader of a test, and the images of its batches.  Not a test."""

import torch

from fastssl.loader import Loader
from fastssl.sampler import Sampler


def open_loader(path, batch=16, *, device="cpu", workers=2, resident=False, **sampling):
    return Loader(path, batch, Sampler(**sampling), device=device, workers=workers, resident=resident)


def image(batch, i):
    h, w = batch.sizes[i].tolist()
    return batch.pixels[i, : h * w].reshape(h, w, 3)


def images(batches):
    return {int(b.index[i]): image(b, i) for b in batches for i in range(len(b.index))}


def equal(one, two):
    return (
        torch.equal(one.index, two.index)
        and torch.equal(one.sizes, two.sizes)
        and all(torch.equal(image(one, i), image(two, i)) for i in range(len(one.index)))
    )
