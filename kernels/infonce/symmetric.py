"""The symmetric InfoNCE as a custom op, by the passes of kernels/similarity: rows of a against rows of b.

Row sums in both directions, then each side's gradient is complete in its own rows: e_ij (w_i + w_j) serves both
softmaxes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..collectives import Group, group_from_name, group_name, rank_world
from ..rows import fake_normalized_rows, normalize_rows
from ..similarity import LossSpec, RankRows, Side, loss_parts, row_gradients, row_losses


def forward(a: Tensor, b: Tensor, temperature: float, normalize: bool, group: Group) -> tuple[Tensor, ...]:
    """The loss, and what backward needs: v, inverse norms and w (see similarity.Side) of a, then those of b."""
    rows, spec = RankRows.of(a, group), LossSpec(temperature, normalize)
    v_a, inv_norm_a, _ = normalize_rows(a, normalize, group)
    v_b, inv_norm_b, _ = normalize_rows(b, normalize, group)
    loss, factor = loss_parts(2, rows.m, a.device), 1 / (2 * rows.m)
    w_a, _ = row_losses(v_a[rows.offset :], v_b, rows, None, spec, loss[0], factor)
    w_b, _ = row_losses(v_b[rows.offset :], v_a, rows, None, spec, loss[1], factor)
    return loss.sum(), v_a, inv_norm_a, w_a, v_b, inv_norm_b, w_b


def backward(
    grad: Tensor, a: Tensor, b: Tensor, saved: Sequence[Tensor], temperature: float, normalize: bool, group: Group
) -> tuple[Tensor, Tensor]:
    rows, spec = RankRows.of(a, group), LossSpec(temperature, normalize)
    side_a, side_b = Side(*saved[:3]), Side(*saved[3:])
    factor = 1 / (2 * rows.m * temperature)
    return (
        row_gradients(grad, a, side_a, side_b, rows, None, spec, factor),
        row_gradients(grad, b, side_b, side_a, rows, None, spec, factor),
    )


@torch.library.custom_op("fastssl::infonce_symmetric", mutates_args=())
def symmetric_op(
    a: Tensor, b: Tensor, temperature: float, normalize: bool, group: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return forward(a, b, temperature, normalize, group_from_name(group))


@symmetric_op.register_fake
def _(a: Tensor, b: Tensor, temperature: float, normalize: bool, group: str) -> tuple[Tensor, ...]:
    world = rank_world(group_from_name(group))[1]

    def side(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        v, inv_norm = fake_normalized_rows(x, normalize, world)
        return v, inv_norm, x.new_empty(len(v), dtype=torch.float32)

    return a.new_empty((), dtype=torch.float32), *side(a), *side(b)


@torch.library.custom_op("fastssl::infonce_symmetric_backward", mutates_args=())
def symmetric_backward_op(
    grad: Tensor, a: Tensor, b: Tensor, saved: list[Tensor], temperature: float, normalize: bool, group: str
) -> tuple[Tensor, Tensor]:
    return backward(grad, a, b, saved, temperature, normalize, group_from_name(group))


@symmetric_backward_op.register_fake
def _(
    grad: Tensor, a: Tensor, b: Tensor, saved: list[Tensor], temperature: float, normalize: bool, group: str
) -> tuple[Tensor, ...]:
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (a, b))


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)  # zeros for the outputs that are only saved would cost memory and time
    a, b, *ctx.options = inputs
    ctx.save_for_backward(a, b, *output[1:])


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    a, b, *saved = ctx.saved_tensors
    return *symmetric_backward_op(grad, a, b, saved, *ctx.options), None, None, None


symmetric_op.register_autograd(_backward, setup_context=_setup)


def infonce_symmetric(a: Tensor, b: Tensor, temperature: float, normalize: bool, group: Group) -> Tensor:
    return symmetric_op(a, b, float(temperature), normalize, group_name(group))[0]
