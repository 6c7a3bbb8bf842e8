"""Norms of whole tensors in an optimizer to which ZeRO passes one flat partition of the parameters at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as td
from torch import Tensor

from fastssl import zero

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class ZeroAware(torch.optim.Optimizer):
    """Base of the optimizers: sums over whole tensors at every ZeRO stage, and common options.

    `clip_each`: clip the gradient of each tensor to this norm (0: no clipping).  A group with `frozen` set keeps its
    parameters and state.
    """

    param_groups: list[dict[str, Any]]
    needs_whole_tensors = False  # whether the update uses norms of whole tensors

    def __init__(self, *args, clip_each: float = 0.0, **options):
        self._whole: set[Tensor] = set()
        self._fragments: dict[Tensor, Fragments] = {}
        self.clip_each = clip_each
        self.found_inf: Tensor | None = None
        super().__init__(*args, **options)

    def add_param_group(self, group: dict) -> None:
        super().add_param_group(group)
        self._whole.update(self.param_groups[-1]["params"])

    def _trained_groups(self) -> list[tuple[dict, list[Tensor]]]:
        """The groups that are not frozen, with their parameters that have a gradient, clipped."""
        groups = [
            (group, [p for p in group["params"] if p.grad is not None])
            for group in self.param_groups
            if not group.get("frozen")
        ]
        for _, params in groups if self.clip_each else ():
            grads = self._views(params, [p.grad for p in params])
            squares = torch.stack(torch._foreach_norm(grads)).square()[None] if grads else None
            norms = self._add_fragments(params, squares, 1)
            if norms is not None and grads:
                torch._foreach_mul_(grads, list((self.clip_each / (norms[0].sqrt() + 1e-6)).clamp(max=1.0).unbind()))
        return groups

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
                    f"{type(self).__name__} was given an unknown flat partition: call optim.attach(engine) after "
                    "deepspeed.initialize"
                )
        return out

    def _add_fragments(self, params: list[Tensor], squares: Tensor | None, rows: int) -> Tensor | None:
        """(rows, n) sums over each of n fragments -> (rows, n) sums over the whole tensor of each fragment, by an
        all-reduce under ZeRO.  `squares` is None on a rank that has only padding."""
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
    """The pieces of one rank's flat partition, in order: fragments of tensors, and padding."""

    sizes: list[int]  # of all pieces
    keep: list[bool]  # False: padding (ZeRO-3 leaves it uninitialised)
    owner: Tensor  # (fragments,) int64: the index of the whole tensor of each fragment
    tensors: int  # number of whole tensors, equal on all ranks
    group: td.ProcessGroup

    @classmethod
    def of(cls, ranges: list[tuple[int, int]], flat: Tensor, group: td.ProcessGroup) -> Fragments:
        """`ranges`: (start, stop) of each whole tensor in the flat partition, in order; empty where stop <= start."""
        sizes, keep, owner, at = [], [], [], 0
        for i, (start, stop) in enumerate(ranges):
            if stop > start:
                sizes += [start - at, stop - start]
                keep += [False, True]
                owner.append(i)
                at = stop
        return cls(
            [*sizes, flat.numel() - at],
            [*keep, False],
            torch.tensor(owner, dtype=torch.int64).to(flat.device),
            len(ranges),
            group,
        )


def attach(engine: DeepSpeedEngine) -> None:
    """Pass ZeRO's partitions of the parameters to the optimizer of `engine` (from deepspeed.initialize)."""
    ours = engine.basic_optimizer
    if engine.optimizer is ours or not (getattr(ours, "needs_whole_tensors", False) or getattr(ours, "clip_each", 0)):
        return
    for flat, fragments in zero.partitions(engine):
        ranges = [(f.offset, f.offset + f.stop - f.start) for f in fragments]
        ours._fragments[flat] = Fragments.of(ranges, flat, engine.optimizer.dp_process_group)
