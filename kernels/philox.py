"""Philox4x32-10, the counter-based generator of Random123 (Salmon et al., SC 2011), in torch integer operations.

A number is a pure function of (key, counter), so a sample's random numbers depend on neither batch, rank nor order.
`triton.language.philox` gives the same bits in a kernel.
"""

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def philox4x32(
    c0: Tensor, c1: Tensor | int, c2: Tensor | int, c3: Tensor | int, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words in [0, 2**32) as int64 tensors for each counter (c0, c1, c2, c3; they broadcast, and only their low
    32 bits count) under the 64-bit key `seed`: the same words as `tl.philox(seed, c0, c1, c2, c3)`."""
    device = next(c.device for c in (c0, c1, c2, c3) if isinstance(c, Tensor))
    counter = [
        c.long() & MASK
        if isinstance(c, Tensor)
        else torch.full((), c & MASK, dtype=torch.int64, device=device)  # a copy from the host would make it wait
        for c in (c0, c1, c2, c3)
    ]
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = seed & MASK, (seed >> 32) & MASK
    for _ in range(10):
        # a 64-bit product that overflows still has the right bits: its high word is bits 32 to 63, whatever the sign
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((b >> 32) & MASK) ^ c1 ^ k0, b & MASK, ((a >> 32) & MASK) ^ c3 ^ k1, a & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def uniform(word: Tensor) -> Tensor:
    """float64 in [0, 1), exact: word / 2**32."""
    return word.double() * 2.0**-32


def below(word: Tensor, n: Tensor | int) -> Tensor:
    """An integer in [0, n), by multiplication (bias below n / 2**32)."""
    return (word * n) >> 32
