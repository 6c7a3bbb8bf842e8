"""LARS and AdamW.  LARS is OpenSelfSup's (https://arxiv.org/abs/1708.03888; lr inside the momentum buffer), with
solo-learn's as options.  It never waits for the device, and its norms are those of whole tensors under ZeRO, too.

Both take "lr" and "weight_decay" of their groups as numbers or as 0-dim tensors on the device, and have `found_inf`:
None, or a 0-dim float32 tensor on the device; where it is not zero, `step` changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastssl.kernels import Impl, multi_tensor
from fastssl.kernels.multi_tensor import LarsOptions
from fastssl.optim.zero_aware import ZeroAware


class AdamW(ZeroAware, torch.optim.AdamW):
    """torch's AdamW in its fused form, with a weight decay that may be a tensor on the device."""

    def __init__(self, groups: list[dict], **options):
        capturable = groups[0]["params"][0].is_cuda  # torch demands it inside a CUDA graph; CPUs do not have it
        super().__init__(groups, **options, fused=True, capturable=capturable)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        assert closure is None, "AdamW takes no closure"
        if self.found_inf is not None:
            self.found_inf = self.found_inf.view(())  # torch subtracts it from step counts, which have no dimension
        moving, groups = self._moving(), self.param_groups
        decays = [(group, group["weight_decay"]) for group, _ in moving]
        for group, params in moving:
            decay = group["weight_decay"]
            if isinstance(decay, Tensor) and params:  # torch's kernel takes a number: its decay is done here
                factor = 1 - group["lr"] * decay
                if self.found_inf is not None:
                    factor = torch.where(self.found_inf != 0, 1.0, factor)
                torch._foreach_mul_(params, factor)
                group["weight_decay"] = 0.0
        self.param_groups = [group for group, _ in moving]
        super().step()
        self.param_groups = groups
        for group, decay in decays:
            group["weight_decay"] = decay


class Lars(ZeroAware, torch.optim.Optimizer):
    """ratio = eta |w| / (|g| + wd |w| + eps), d = ratio lr (g + wd w),
    buf = momentum buf + (1 - dampening) d, w -= buf.

    A tensor whose weights or gradient are all zero, and every tensor of a `lars_exclude` group, has ratio 1: with all
    groups excluded and `lr_in_momentum=False` this is torch's SGD.  `lr_in_momentum=False` applies lr to the buffer
    instead of d; `clip_lr` bounds ratio lr by lr (both solo-learn); `norm_of_sum` divides by |g + wd w| + eps.
    """

    needs_whole_tensors = True

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        eta: float = 1e-3,
        clip_lr: bool = False,
        lr_in_momentum: bool = True,
        lars_exclude: bool = False,
        eps: float = 0.0,
        norm_of_sum: bool = False,
        clip_each: float = 0.0,
        impl: Impl = "auto",
    ):
        self.impl = impl
        options = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "eta": eta,
            "clip_lr": clip_lr,
            "lr_in_momentum": lr_in_momentum,
            "lars_exclude": lars_exclude,
            "eps": eps,
            "norm_of_sum": norm_of_sum,
        }
        super().__init__(params, options, clip_each=clip_each)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        assert closure is None, "LARS takes no closure"
        for group, params in self._moving():
            fresh = {p for p in params if "momentum_buffer" not in self.state[p]} if group["momentum"] else set()
            if fresh and group["dampening"] and self.found_inf is not None and bool(self.found_inf):
                continue  # the first buffer that is kept must be one without dampening; this waits for the device
            for first in (True, False):
                some = [p for p in params if (p in fresh) == first]
                if some:
                    self._step(group, some, first)

    def _step(self, group: dict, params: list[Tensor], first: bool) -> None:
        exclude = group["lars_exclude"]
        views = (lambda _, values: values) if exclude else self._views
        w, g = views(params, params), views(params, [p.grad for p in params])
        squares = None if exclude else self._squares(group, params, w, g)
        buffers = None
        if group["momentum"]:
            for p in params if first else ():
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = views(params, [self.state[p]["momentum_buffer"] for p in params])
        options = LarsOptions(**{k: group[k] for k in LarsOptions._fields if k != "first"}, first=first)
        multi_tensor.lars_(w, g, buffers, squares, options, found_inf=self.found_inf, impl=self.impl)

    def _squares(self, group: dict, params: list[Tensor], w: list[Tensor], g: list[Tensor]) -> Tensor | None:
        """(3, n) sums of squares of whole tensors, for each fragment."""
        squares = multi_tensor.square_sums(w, g, group["weight_decay"], impl=self.impl) if w else None
        return self._add_fragments(params, squares, 3)
