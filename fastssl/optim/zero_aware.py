"""What an optimizer needs to know of whole tensors when ZeRO hands it one flat partition at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as td
from torch import Tensor

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class ZeroAware(torch.optim.Optimizer):
    """Base of our optimizers: sums over whole tensors at every ZeRO stage, and the options that they share.  A group
    that is `frozen` keeps its parameters and state, as if it had no gradient; `clip_each` clips the gradient of every
    tensor to that norm (0: no clipping)."""

    param_groups: list[dict[str, Any]]
    needs_whole_tensors = False  # its update takes norms of whole tensors

    def __init__(self, *args, clip_each: float = 0.0, **options):
        self._whole: set[Tensor] = set()
        self._fragments: dict[Tensor, Fragments] = {}
        self.clip_each = clip_each
        self.found_inf: Tensor | None = None
        super().__init__(*args, **options)

    def add_param_group(self, group: dict) -> None:
        super().add_param_group(group)
        self._whole.update(self.param_groups[-1]["params"])

    def _moving(self) -> list[tuple[dict, list[Tensor]]]:
        """The groups that are not frozen, with their parameters that have a gradient, clipped."""
        moving = [
            (group, [p for p in group["params"] if p.grad is not None])
            for group in self.param_groups
            if not group.get("frozen")
        ]
        for _, params in moving if self.clip_each else ():
            grads = self._views(params, [p.grad for p in params])
            squares = torch.stack(torch._foreach_norm(grads)).square()[None] if grads else None
            norms = self._add_fragments(params, squares, 1)
            if norms is not None and grads:
                torch._foreach_mul_(grads, list((self.clip_each / (norms[0].sqrt() + 1e-6)).clamp(max=1.0).unbind()))
        return moving

    def _views(self, params: list[Tensor], values: list[Tensor]) -> list[Tensor]:
        """`values` (one per parameter) cut into the fragments of whole tensors, without ZeRO's padding."""
        out = []
        for p, value in zip(params, values):
            if p in self._fragments:
                cut = self._fragments[p]
                out += [v for v, keep in zip(value.view(-1).split(cut.sizes), cut.keep) if keep]
            elif p in self._whole:
                out.append(value)
            else:
                raise RuntimeError(
                    f"{type(self).__name__} was handed a flat partition that it does not know: call "
                    "optim.attach(engine) after deepspeed.initialize"
                )
        return out

    def _add_fragments(self, params: list[Tensor], squares: Tensor | None, rows: int) -> Tensor | None:
        """(rows, n) sums over each of n fragments -> those of the whole tensor that it is a part of: under ZeRO one
        all-reduce adds the fragments'.  `squares` is None on a rank that holds nothing but padding."""
        cuts = [self._fragments[p] for p in params if p in self._fragments]
        if cuts:
            assert len(params) == 1, "ZeRO steps one flat partition at a time"
            cut, p = cuts[0], params[0]
            whole = torch.zeros(rows, cut.tensors, dtype=p.dtype, device=p.device)
            if squares is not None:
                whole[:, cut.owner] = squares
            if td.get_world_size(cut.group) > 1:
                td.all_reduce(whole, group=cut.group)
            squares = whole[:, cut.owner]
        return squares


@dataclass
class Fragments:
    """What one rank's flat partition consists of, in order."""

    sizes: list[int]  # all stretches, padding included
    keep: list[bool]  # False: padding (ZeRO-3 leaves it uninitialised)
    owner: Tensor  # (n kept,) int64: which whole tensor of the partition's group a stretch belongs to
    tensors: int  # whole tensors, the same number on every rank
    group: td.ProcessGroup

    @classmethod
    def of(cls, stretches: list[tuple[int, int]], flat: Tensor, group: td.ProcessGroup) -> Fragments:
        """`stretches`: (start, stop) in the flat partition of each whole tensor, in order; none where stop <= start."""
        sizes, keep, owner, at = [], [], [], 0
        for i, (start, stop) in enumerate(stretches):
            if stop > start:
                sizes += [start - at, stop - start]
                keep += [False, True]
                owner.append(i)
                at = stop
        return cls(
            [*sizes, flat.numel() - at],
            [*keep, False],
            torch.tensor(owner, dtype=torch.int64).to(flat.device),
            len(stretches),
            group,
        )


def attach(engine: DeepSpeedEngine) -> None:
    """Give our optimizer the partition of the parameters by `engine` (of deepspeed.initialize)."""
    ours, zero = engine.basic_optimizer, engine.optimizer
    if zero is ours or not (getattr(ours, "needs_whole_tensors", False) or getattr(ours, "clip_each", 0)):
        return
    group = zero.dp_process_group
    rank = td.get_rank(group)
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # ZeRO-3: every tensor is cut into equal parts, the last padded
        for params, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat):
            stretches, at = [], 0
            for p in params:
                size = p.partition_numel()
                stretches.append((at, at + min(size, p.ds_numel - rank * size)))
                at += size
            ours._fragments[flat] = Fragments.of(stretches, flat, group)
    elif hasattr(zero, "single_partition_of_fp32_groups"):  # ZeRO-1 and 2: the concatenation is cut into equal parts
        for i, flat in enumerate(zero.single_partition_of_fp32_groups):
            begin, size = rank * zero.partition_size[i], zero.partition_size[i]
            stretches = []
            for meta, offset in zip(zero.round_robin_bit16_meta[i], zero.round_robin_bit16_offsets[i]):
                start, stop = offset - begin, offset + meta.numel() - begin
                stretches.append((max(start, 0), min(stop, size)))
            ours._fragments[flat] = Fragments.of(stretches, flat, group)
    else:
        raise ValueError(
            f"{type(ours).__name__} does not know how {type(zero).__name__} cuts parameters; "
            "use speed.zero 0 to 3 without other DeepSpeed optimizers"
        )
