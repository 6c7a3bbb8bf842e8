"""The definitions, by PyTorch's operations on lists of tensors."""

from typing import NamedTuple

import torch
from torch import Tensor


class LarsOptions(NamedTuple):
    """Options of a step; see lars_."""

    lr: float | Tensor  # a number or a 0-dim tensor, as weight_decay
    weight_decay: float | Tensor
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    eta: float = 1e-3
    eps: float = 0.0
    norm_of_sum: bool = False
    clip_lr: bool = False
    lr_in_momentum: bool = True
    first: bool = False  # whether this is the tensors' first step, without momentum buffers yet


def lerp_(targets: list[Tensor], sources: list[Tensor], weight: float | Tensor, found_inf: Tensor | None) -> None:
    sources = [s.view_as(t) for t, s in zip(targets, sources)]
    if not isinstance(weight, Tensor) and found_inf is None:
        torch._foreach_lerp_(targets, sources, weight)
        return
    for t, s in zip(targets, sources):
        new = torch.lerp(t, s, torch.as_tensor(weight, dtype=t.dtype, device=t.device))
        t.copy_(_unless_inf(found_inf, t, new))


def square_sums(params: list[Tensor], grads: list[Tensor], weight_decay: float | Tensor) -> Tensor:
    if not params:
        return torch.zeros(3, 0)
    decayed = _decayed(params, grads, weight_decay)
    norms = [torch._foreach_norm(list(x)) for x in (params, grads, decayed)]
    return torch.stack([n for row in norms for n in row]).view(3, -1).square()


def lars_(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor] | None,
    squares: Tensor | None,
    options: LarsOptions,
    found_inf: Tensor | None,
) -> None:
    d = _decayed(params, grads, options.weight_decay)
    scale = None if squares is None else ratios(squares, options)
    if options.lr_in_momentum:
        scale = options.lr if scale is None else scale * options.lr
    if isinstance(scale, Tensor) and scale.ndim:
        torch._foreach_mul_(d, list(scale.unbind()))
    elif scale is not None:
        torch._foreach_mul_(d, scale)
    if buffers is not None:
        flat = [b.view_as(p) for b, p in zip(buffers, params)]
        new = torch._foreach_mul(flat, options.momentum)
        torch._foreach_add_(new, d, alpha=1 - options.dampening)
        new = d if options.first else new
        d = torch._foreach_add(d, new, alpha=options.momentum) if options.nesterov else new
        torch._foreach_copy_(flat, [_unless_inf(found_inf, b, n) for b, n in zip(flat, new)])
    if not options.lr_in_momentum:
        d = torch._foreach_mul(d, options.lr)
    torch._foreach_copy_(params, [_unless_inf(found_inf, p, p - x) for p, x in zip(params, d)])


def ratios(squares: Tensor, options: LarsOptions) -> Tensor:
    """(n,) trust ratios of LARS; with `clip_lr` divided by lr, since the caller multiplies by it."""
    w, g, both = squares.sqrt()
    denominator = (both if options.norm_of_sum else g + options.weight_decay * w) + options.eps
    ratio = options.eta * w / denominator
    gradient = both if options.norm_of_sum else g  # SimCLR's, BYOL's and MoCo v3's authors decay a zero gradient, too
    if options.clip_lr:
        lr = torch.as_tensor(options.lr, dtype=ratio.dtype, device=ratio.device)
        ratio = torch.where(lr > 0, (ratio / lr).clamp(max=1.0), 1.0)
    return torch.where((w > 0) & (gradient > 0), ratio, 1.0)


def _decayed(params: list[Tensor], grads: list[Tensor], weight_decay: float | Tensor) -> list[Tensor]:
    grads = [g.view_as(p) for p, g in zip(params, grads)]
    if isinstance(weight_decay, Tensor):
        return torch._foreach_add(grads, torch._foreach_mul(list(params), weight_decay))
    return torch._foreach_add(grads, list(params), alpha=weight_decay)


def _unless_inf(found_inf: Tensor | None, old: Tensor, new: Tensor) -> Tensor:
    return new if found_inf is None else torch.where(found_inf != 0, old, new)
