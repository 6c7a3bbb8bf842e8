"""The definitions in PyTorch's own operations over lists."""

import torch
from torch import Tensor


def lerp_(targets, sources, weight, found_inf):
    sources = [s.view_as(t) for t, s in zip(targets, sources)]
    if not isinstance(weight, Tensor) and found_inf is None:
        torch._foreach_lerp_(targets, sources, weight)
        return
    for t, s in zip(targets, sources):
        t.copy_(_kept(found_inf, t, torch.lerp(t, s, torch.as_tensor(weight, dtype=t.dtype, device=t.device))))


def square_sums(params, grads, weight_decay):
    if not params:
        return torch.zeros(3, 0)
    decayed = _decayed(params, grads, weight_decay)
    norms = [torch._foreach_norm(list(x)) for x in (params, grads, decayed)]
    return torch.stack([n for row in norms for n in row]).view(3, -1).square()


def lars_(
    params,
    grads,
    buffers,
    squares,
    lr,
    weight_decay,
    momentum,
    dampening,
    nesterov,
    eta,
    eps,
    norm_of_sum,
    clip_lr,
    lr_in_momentum,
    first,
    found_inf,
):
    d = _decayed(params, grads, weight_decay)
    scale = None if squares is None else ratios(squares, lr, weight_decay, eta, eps, norm_of_sum, clip_lr)
    if lr_in_momentum:
        scale = lr if scale is None else scale * lr
    if isinstance(scale, Tensor) and scale.ndim:
        torch._foreach_mul_(d, list(scale.unbind()))
    elif scale is not None:
        torch._foreach_mul_(d, scale)
    if buffers is not None:
        flat = [b.view_as(p) for b, p in zip(buffers, params)]
        new = torch._foreach_mul(flat, momentum)
        torch._foreach_add_(new, d, alpha=1 - dampening)
        new = d if first else new
        d = torch._foreach_add(d, new, alpha=momentum) if nesterov else new
        torch._foreach_copy_(flat, [_kept(found_inf, b, n) for b, n in zip(flat, new)])
    if not lr_in_momentum:
        d = torch._foreach_mul(d, lr)
    torch._foreach_copy_(params, [_kept(found_inf, p, p - x) for p, x in zip(params, d)])


def ratios(squares: Tensor, lr, weight_decay, eta: float, eps: float, norm_of_sum: bool, clip_lr: bool) -> Tensor:
    """(n,) trust ratios of LARS; with `clip_lr` divided by lr, which the caller multiplies by."""
    w, g, both = squares.sqrt()
    ratio = eta * w / ((both if norm_of_sum else g + weight_decay * w) + eps)
    moved = both if norm_of_sum else g  # SimCLR's, BYOL's, MoCo v3's authors decay tensors without a gradient, too
    if clip_lr:
        lr = torch.as_tensor(lr, dtype=ratio.dtype, device=ratio.device)
        ratio = torch.where(lr > 0, (ratio / lr).clamp(max=1.0), 1.0)
    return torch.where((w > 0) & (moved > 0), ratio, 1.0)


def _decayed(params, grads, weight_decay) -> list[Tensor]:
    grads = [g.view_as(p) for p, g in zip(params, grads)]
    if isinstance(weight_decay, Tensor):
        return torch._foreach_add(grads, torch._foreach_mul(list(params), weight_decay))
    return torch._foreach_add(grads, list(params), alpha=weight_decay)


def _kept(found_inf: Tensor | None, old: Tensor, new: Tensor) -> Tensor:
    return new if found_inf is None else torch.where(found_inf != 0, old, new)
