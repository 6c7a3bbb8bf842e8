"""Collectives along dim 0 for losses over the batch of a process group; `group=None` means this process only.

The loss of the group is the mean over ranks of what each rank returns.  The backward of each collective is its adjoint,
so averaging parameter gradients over ranks gives the gradient of that mean.
"""

from typing import Any, TypeAlias

import torch
import torch.distributed as td
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

Group: TypeAlias = td.ProcessGroup | None  # whose ranks' rows form one batch; None: this process only


def rank_world(group: Group) -> tuple[int, int]:
    return (0, 1) if group is None else (td.get_rank(group), td.get_world_size(group))


def group_name(group: Group) -> str:
    """A string, since custom ops cannot take a group; "" means this process only."""
    return "" if group is None else group.group_name


def group_from_name(name: str) -> Group:
    return _resolve_process_group(name) if name else None


def gather(x: Tensor, group: Group, padded_rows: int = 0) -> Tensor:
    """Rows of all ranks in rank order, without gradient.  Every rank must have the same number of rows.

    padded_rows: the result has at least that many rows, uninitialised after the gathered ones (a single process gets x
    itself).
    """
    if group is None:
        return x
    rows = td.get_world_size(group) * x.shape[0]
    out = x.new_empty((max(padded_rows, rows), *x.shape[1:]))
    td.all_gather_into_tensor(out[:rows], x.contiguous(), group=group)
    return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return gather(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        td.all_reduce(grad, group=ctx.group)  # the adjoint is a reduce-scatter, which not every build of gloo has
        rank, world = rank_world(ctx.group)
        return grad.chunk(world)[rank], None


def gather_with_grad(x: Tensor, group: Group) -> Tensor:
    return x if group is None else _Gather.apply(x, group)


def all_reduce(x: Tensor, group: Group, op: td.ReduceOp.RedOpType = td.ReduceOp.SUM) -> Tensor:
    """In place; returns x."""
    if group is not None:
        td.all_reduce(x, op=op, group=group)
    return x
