"""Fused kernels: one folder per op, with its definition in plain PyTorch and its Triton kernels (docs/kernels.md).

Depends on torch and triton, the views on a CPU on numba, too.  impl="auto" uses Triton on CUDA and the definition in
plain PyTorch elsewhere; for views on a CPU it uses loops compiled by numba.
"""

from .bank import update_bank_, update_centroids_
from .common import Impl
from .gathered import gathered_nce
from .infonce import infonce, infonce_symmetric
from .multi_tensor import lars_, lerp_, square_sums
from .ntxent import ntxent
from .queue import enqueue_
from .sinkhorn import sinkhorn, sinkhorn_center
from .soft_cross_entropy import soft_cross_entropy
