"""LARS and AdamW.

LARS (https://arxiv.org/abs/1708.03888) is OpenSelfSup's, with lr inside the momentum buffer; options give other
projects'.  Its norms are those of whole tensors also under ZeRO, and it does not make the host wait for the device.

In both, "lr" and "weight_decay" of a group are numbers or 0-dim tensors on the device.  Their attribute `found_inf` is
None or a 0-dim float32 tensor on the device; if it is nonzero, `step` changes nothing.
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
    """torch's fused AdamW, with a weight decay that may be a 0-dim tensor on the device."""

    def __init__(self, groups: list[dict], **options):
        capturable = groups[0]["params"][0].is_cuda  # required in a CUDA graph, not available on CPU
        super().__init__(groups, **options, fused=True, capturable=capturable)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        assert closure is None, "AdamW takes no closure"
        if self.found_inf is not None:
            self.found_inf = self.found_inf.view(())  # 0-dim: torch subtracts it from the step counts
        trained, all_groups = self._trained_groups(), self.param_groups
        decays = [(group, group["weight_decay"]) for group, _ in trained]
        for group, params in trained:
            decay = group["weight_decay"]
            if isinstance(decay, Tensor) and params:  # torch's kernel needs a number, so decay here
                factor = 1 - group["lr"] * decay
                if self.found_inf is not None:
                    factor = torch.where(self.found_inf != 0, 1.0, factor)
                torch._foreach_mul_(params, factor)
                group["weight_decay"] = 0.0
        self.param_groups = [group for group, _ in trained]
        super().step()
        self.param_groups = all_groups
        for group, decay in decays:
            group["weight_decay"] = decay


class Lars(ZeroAware, torch.optim.Optimizer):
    """LARS; `fastssl.kernels.multi_tensor.lars_` has the formulas of the update.

    `options`: initial options of all groups; every group may have its own.  Tensors of a group with `lars_exclude` have
    trust ratio 1: with all groups excluded and `lr_in_momentum=False` this is torch's SGD.
    """

    needs_whole_tensors = True

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        options: LarsOptions,
        *,
        lars_exclude: bool = False,
        clip_each: float = 0.0,
        impl: Impl = "auto",
    ):
        self.impl = impl
        defaults = {**options._asdict(), "lars_exclude": lars_exclude}
        del defaults["first"]  # of each tensor, not of a group
        super().__init__(params, defaults, clip_each=clip_each)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        assert closure is None, "LARS takes no closure"
        for group, params in self._trained_groups():
            new = {p for p in params if "momentum_buffer" not in self.state[p]} if group["momentum"] else set()
            if new and group["dampening"] and self.found_inf is not None and bool(self.found_inf):
                continue  # after an overflow the buffers are still to be initialised without dampening (a device sync)
            for first in (True, False):
                selected = [p for p in params if (p in new) == first]
                if selected:
                    self._step(group, selected, first)

    def _step(self, group: dict, params: list[Tensor], first: bool) -> None:
        exclude = group["lars_exclude"]
        views = (lambda _, values: values) if exclude else self._views
        w, g = views(params, params), views(params, [p.grad for p in params])
        squares = None
        if not exclude:  # (3, n): for each fragment, the sums of squares of its whole tensor
            own = multi_tensor.square_sums(w, g, group["weight_decay"], impl=self.impl) if w else None
            squares = self._add_fragments(params, own, 3)
        buffers = None
        if group["momentum"]:
            for p in params if first else ():
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = views(params, [self.state[p]["momentum_buffer"] for p in params])
        options = LarsOptions(**{k: group[k] for k in LarsOptions._fields if k != "first"}, first=first)
        multi_tensor.lars_(w, g, buffers, squares, options, found_inf=self.found_inf, impl=self.impl)
