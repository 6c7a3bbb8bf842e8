"""The two-sided InfoNCE by NT-Xent's tiles: the rows of a are one side's, those of b the other's.

Row sums both ways, then each side's gradient is complete in its own rows: e_ij (w_i + w_j) serves both softmaxes.
"""

import torch
from torch import Tensor

from ..collectives import group_name, named_group, rank_world
from ..common import cdiv
from ..ntxent.launch import PAD, Form, loss_parts, padded_width, prepare, row_gradients, row_losses, tile_dtype


def forward(a, b, temperature, normalize, group):
    """-> loss; then for a and for b: cast rows of all ranks, inverse norms, weights of all rows."""
    m = a.shape[0]
    rank, world = rank_world(group)
    form = Form(temperature, normalize, diagonal=False, decoupled=False, half=0)
    va, inv_a, _ = prepare(a, None, form, group)
    vb, inv_b, _ = prepare(b, None, form, group)
    sizes = (m, m * world, rank * m)
    loss, share = loss_parts(2, m, a.device), 1 / (2 * m)
    wa, _ = row_losses(va[rank * m :], vb, *sizes, None, None, form, loss[0], share, group)
    wb, _ = row_losses(vb[rank * m :], va, *sizes, None, None, form, loss[1], share, group)
    return loss.sum(), va, inv_a, wa, vb, inv_b, wb


def backward(grad, a, b, va, inv_a, wa, vb, inv_b, wb, temperature, normalize, group):
    m = a.shape[0]
    rank, world = rank_world(group)
    form = Form(temperature, normalize, diagonal=False, decoupled=False, half=0)
    own = slice(rank * m, (rank + 1) * m)
    rest = (None, m * world, rank * m, None, form, 1 / (2 * m * temperature))
    return (
        row_gradients(grad, a, inv_a, va[own], vb, wa[own], wb, *rest),
        row_gradients(grad, b, inv_b, vb[own], va, wb[own], wa, *rest),
    )


@torch.library.custom_op("fastssl::infonce_symmetric", mutates_args=())
def symmetric_op(
    a: Tensor, b: Tensor, temperature: float, normalize: bool, group: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return forward(a, b, temperature, normalize, named_group(group))


@symmetric_op.register_fake
def _(a, b, temperature, normalize, group):
    n = a.shape[0] * rank_world(named_group(group))[1]

    def side(x):
        dtype = tile_dtype(x.dtype, normalize)
        v = x.new_empty((cdiv(n, PAD) * PAD, padded_width(x.shape[1], dtype)), dtype=dtype)
        return v, x.new_empty(x.shape[0], dtype=torch.float32), x.new_empty(len(v), dtype=torch.float32)

    return a.new_empty((), dtype=torch.float32), *side(a), *side(b)


@torch.library.custom_op("fastssl::infonce_symmetric_backward", mutates_args=())
def symmetric_backward_op(
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    va: Tensor,
    inv_a: Tensor,
    wa: Tensor,
    vb: Tensor,
    inv_b: Tensor,
    wb: Tensor,
    temperature: float,
    normalize: bool,
    group: str,
) -> tuple[Tensor, Tensor]:
    return backward(grad, a, b, va, inv_a, wa, vb, inv_b, wb, temperature, normalize, named_group(group))


@symmetric_backward_op.register_fake
def _(grad, a, b, va, inv_a, wa, vb, inv_b, wb, temperature, normalize, group):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (a, b))


def _setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # zeros for the outputs that are only saved would cost memory and time
    a, b, *ctx.rest = inputs
    ctx.save_for_backward(a, b, *output[1:])


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 5
    return *symmetric_backward_op(grad, *ctx.saved_tensors, *ctx.rest), None, None, None


symmetric_op.register_autograd(_backward, setup_context=_setup)


def infonce_symmetric(a, b, temperature, normalize, group):
    return symmetric_op(a, b, float(temperature), normalize, group_name(group))[0]
