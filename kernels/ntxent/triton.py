"""NT-Xent as a custom op: four launches forward, two backward, memory for z in half precision and a few vectors.

The tiles are in tiles.py, the passes over rows in rows.py, their launches in launch.py.  Not measured yet on a GPU.
"""

import torch
from torch import Tensor

from ..collectives import group_name, named_group, rank_world
from ..common import cdiv
from .launch import PAD, Form, padded_width, prepare, row_gradients, row_losses, tile_dtype


def forward(z, labels, temperature, decoupled, normalize, group):
    """-> loss, v, inverse norms, all rows' weights w, and with labels one over the number of their positives."""
    m = z.shape[0]
    rank, world = rank_world(group)
    form = Form(temperature, normalize, diagonal=True, decoupled=decoupled, half=m // 2)
    v, inv, dot = prepare(z, z if labels is None else None, form, group)
    total, w, a = row_losses(v[rank * m :], v, m, m * world, rank * m, labels, dot, form, group)
    return total / m, v, inv, w, a


def backward(grad, z, labels, v, inv, w, a, temperature, decoupled, normalize, group):
    m = z.shape[0]
    rank, world = rank_world(group)
    form = Form(temperature, normalize, diagonal=True, decoupled=decoupled, half=m // 2)
    own = slice(rank * m, (rank + 1) * m)
    return row_gradients(
        grad, z, inv, v[own], v, w[own], w, a, m * world, rank * m, labels, form, 1 / (m * temperature)
    )


@torch.library.custom_op("fastssl::ntxent", mutates_args=())
def ntxent_op(
    z: Tensor, labels: Tensor | None, temperature: float, decoupled: bool, normalize: bool, group: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return forward(z, labels, temperature, decoupled, normalize, named_group(group))


@ntxent_op.register_fake
def _(z, labels, temperature, decoupled, normalize, group):
    m, d = z.shape
    n = m * rank_world(named_group(group))[1]
    dtype = tile_dtype(z.dtype, normalize)
    f32 = {"dtype": torch.float32}
    v = z.new_empty((cdiv(n, PAD) * PAD, padded_width(d, dtype)), dtype=dtype)
    counts = 0 if labels is None else len(v)
    return z.new_empty((), **f32), v, z.new_empty(m, **f32), z.new_empty(len(v), **f32), z.new_empty(counts, **f32)


@torch.library.custom_op("fastssl::ntxent_backward", mutates_args=())
def ntxent_backward_op(
    grad: Tensor, z: Tensor, labels: Tensor | None, v: Tensor, inv: Tensor, w: Tensor, a: Tensor,
    temperature: float, decoupled: bool, normalize: bool, group: str,
) -> Tensor:  # fmt: skip
    return backward(grad, z, labels, v, inv, w, a, temperature, decoupled, normalize, named_group(group))


@ntxent_backward_op.register_fake
def _(grad, z, labels, v, inv, w, a, temperature, decoupled, normalize, group):
    return torch.empty(z.shape, dtype=z.dtype, device=z.device)


def _setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # zeros for the outputs that are only saved would cost memory and time
    z, labels, *ctx.rest = inputs
    ctx.save_for_backward(z, labels, *output[1:])


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 6
    return ntxent_backward_op(grad, *ctx.saved_tensors, *ctx.rest), None, None, None, None, None


ntxent_op.register_autograd(_backward, setup_context=_setup)


def ntxent(z, temperature, labels, decoupled, normalize, group):
    return ntxent_op(z, labels, float(temperature), decoupled, normalize, group_name(group))[0]
