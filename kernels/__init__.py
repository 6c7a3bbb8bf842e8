"""Fused kernels: one folder an op, its definition in plain PyTorch beside its Triton form (docs/kernels.md).

Depends on torch and triton only.  impl="auto" picks Triton on CUDA and the definition elsewhere.
"""

from .infonce import infonce, infonce_symmetric
from .ntxent import ntxent
from .queue import push_

__all__ = ["infonce", "infonce_symmetric", "ntxent", "push_"]
