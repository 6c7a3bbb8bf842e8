"""NT-Xent as a custom op: four launches forward, two backward, memory for z in half precision and a few vectors.

The passes are in kernels/similarity.  Times: docs/kernels.md.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..collectives import Group, group_from_name, group_name, rank_world
from ..rows import fake_normalized_rows, normalize_rows
from ..similarity import LossSpec, RankRows, Side, classes_of, loss_parts, row_gradients, row_losses


def forward(
    z: Tensor, labels: Tensor | None, temperature: float, decoupled: bool, normalize: bool, group: Group
) -> tuple[Tensor, ...]:
    """The loss, and what backward needs: v, inverse norms and w (see similarity.Side), 1 / number of positives of each
    of this rank's rows, and the classes of all rows (both empty without labels)."""
    rows = RankRows.of(z, group)
    spec = LossSpec(temperature, normalize, exclude_self=True, decoupled=decoupled, positive_offset=rows.m // 2)
    v, inv_norm, _ = normalize_rows(z, normalize, group)
    classes, count = (v.new_empty(0, dtype=torch.int32), None) if labels is None else classes_of(labels, len(v))
    loss = loss_parts(1, rows.m, z.device)
    class_counts = None if labels is None else (classes, count)
    w, inv_positives = row_losses(v[rows.offset :], v, rows, class_counts, spec, loss[0], 1 / rows.m)
    return loss.sum(), v, inv_norm, w, inv_positives, classes


def backward(
    grad: Tensor, z: Tensor, saved: Sequence[Tensor], temperature: float, decoupled: bool, normalize: bool, group: Group
) -> Tensor:
    v, inv_norm, w, inv_positives, classes = saved
    rows, side = RankRows.of(z, group), Side(v, inv_norm, w)
    spec = LossSpec(temperature, normalize, exclude_self=True, decoupled=decoupled, positive_offset=rows.m // 2)
    labels = (classes, inv_positives) if len(classes) else None
    return row_gradients(grad, z, side, side, rows, labels, spec, 1 / (rows.m * temperature))


@torch.library.custom_op("fastssl::ntxent", mutates_args=())
def ntxent_op(
    z: Tensor, labels: Tensor | None, temperature: float, decoupled: bool, normalize: bool, group: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return forward(z, labels, temperature, decoupled, normalize, group_from_name(group))


@ntxent_op.register_fake
def _(
    z: Tensor, labels: Tensor | None, temperature: float, decoupled: bool, normalize: bool, group: str
) -> tuple[Tensor, ...]:
    v, inv_norm = fake_normalized_rows(z, normalize, rank_world(group_from_name(group))[1])
    inv_positives, classes = (0, 0) if labels is None else (len(z), len(v))
    return (
        z.new_empty((), dtype=torch.float32),
        v,
        inv_norm,
        z.new_empty(len(v), dtype=torch.float32),
        z.new_empty(inv_positives, dtype=torch.float32),
        z.new_empty(classes, dtype=torch.int32),
    )


@torch.library.custom_op("fastssl::ntxent_backward", mutates_args=())
def ntxent_backward_op(
    grad: Tensor, z: Tensor, saved: list[Tensor], temperature: float, decoupled: bool, normalize: bool, group: str
) -> Tensor:
    return backward(grad, z, saved, temperature, decoupled, normalize, group_from_name(group))


@ntxent_backward_op.register_fake
def _(
    grad: Tensor, z: Tensor, saved: list[Tensor], temperature: float, decoupled: bool, normalize: bool, group: str
) -> Tensor:
    return torch.empty(z.shape, dtype=z.dtype, device=z.device)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)  # zeros for the outputs that are only saved would cost memory and time
    z, _, *ctx.options = inputs
    ctx.save_for_backward(z, *output[1:])


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    z, *saved = ctx.saved_tensors
    return ntxent_backward_op(grad, z, saved, *ctx.options), None, None, None, None, None


ntxent_op.register_autograd(_backward, setup_context=_setup)


def ntxent(
    z: Tensor, temperature: float, labels: Tensor | None, decoupled: bool, normalize: bool, group: Group
) -> Tensor:
    return ntxent_op(z, labels, float(temperature), decoupled, normalize, group_name(group))[0]
