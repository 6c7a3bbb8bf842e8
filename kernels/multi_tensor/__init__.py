"""Optimizer arithmetic on lists of any number of tensors, in one launch each: LARS, its norms, and the moving average
of a momentum encoder.  Learning rates, weights and the overflow flag may be on the device, so that a captured CUDA
graph reads their current values.

Tensors correspond by position in the lists.  They are dense, of one dtype and device; the Triton kernels take float32.
"""

from types import ModuleType

import torch
from torch import Tensor

from ..common import Impl, choose
from . import reference
from .reference import LarsOptions


def lerp_(
    targets: list[Tensor],
    sources: list[Tensor],
    weight: float | Tensor,
    *,
    found_inf: Tensor | None = None,
    impl: Impl = "auto",
) -> None:
    """target <- target + weight (source - target) for every pair, in place.

    weight: a number or a 0-dim tensor.  found_inf: None, or a 0-dim float32 tensor on the device; if it is nonzero,
    nothing changes.
    """
    _check("lerp_", targets, sources)
    if targets:
        with torch.no_grad():
            _module(impl, targets).lerp_(targets, sources, weight, found_inf)


def square_sums(
    params: list[Tensor], grads: list[Tensor], weight_decay: float | Tensor, *, impl: Impl = "auto"
) -> Tensor:
    """(3, n): the sums of squares of each parameter w, of its gradient g, and of g + weight_decay w."""
    _check("square_sums", params, grads)
    with torch.no_grad():
        return _module(impl, params).square_sums(params, grads, weight_decay)


def lars_(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor] | None,
    squares: Tensor | None,
    options: LarsOptions,
    *,
    found_inf: Tensor | None = None,
    impl: Impl = "auto",
) -> None:
    """One step of SGD with momentum and LARS's trust ratio per tensor (https://arxiv.org/abs/1708.03888), in place.

        ratio = eta |w| / (|g| + weight_decay |w| + eps)      norm_of_sum: eta |w| / (|g + weight_decay w| + eps)
        d = ratio lr (g + weight_decay w)                     clip_lr: min(ratio, lr) in place of ratio lr
        buffer = momentum buffer + (1 - dampening) d          first: buffer = d
        w = w - buffer                                        nesterov: w - (d + momentum buffer)

    squares: the result of `square_sums`; None: ratio 1, which is torch's SGD.  The ratio is also 1 for a tensor whose
    weights or gradient (norm_of_sum: gradient and decay together) are all zero.  lr_in_momentum=False: lr multiplies
    what is subtracted from w instead of d.  buffers: None without momentum.  found_inf: None, or a 0-dim float32 tensor
    on the device; where it is not zero, nothing changes.  grads may be overwritten.
    """
    buffers = buffers if options.momentum else None
    if options.momentum and buffers is None:
        raise ValueError(f"lars_: momentum={options.momentum:g} needs `buffers`, one tensor for each parameter")
    _check("lars_", params, grads, *([] if buffers is None else [buffers]))
    if params:
        with torch.no_grad():
            _module(impl, params).lars_(params, grads, buffers, squares, options, found_inf)


def _module(impl: Impl, tensors: list[Tensor]) -> ModuleType:
    """The module of the implementation: reference or triton."""
    if not tensors:
        return reference
    x = tensors[0]
    if impl == "auto" and x.dtype != torch.float32:  # float64 in the exactness tests
        return reference
    if choose(impl, x) == "reference":
        return reference
    if any(t.dtype != torch.float32 for t in tensors):
        raise ValueError(f"multi_tensor: the Triton kernels take float32, got {x.dtype}; use impl='reference'")
    from . import triton

    return triton


def _check(op: str, first: list[Tensor], *others: list[Tensor]) -> None:
    for other in others:
        if len(other) != len(first):
            raise ValueError(f"{op}: the lists have {len(first)} and {len(other)} tensors, but must have equal length")
        for a, b in zip(first, other):
            if a.numel() != b.numel() or a.dtype != b.dtype or a.device != b.device:
                raise ValueError(
                    f"{op}: {a.dtype} {tuple(a.shape)} on {a.device} is paired with {b.dtype} "
                    f"{tuple(b.shape)} on {b.device}: sizes, dtypes and devices must agree"
                )
