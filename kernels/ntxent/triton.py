"""NT-Xent as a custom op: four launches forward, two backward, memory for z in half precision and a few vectors.

The tiles are in tiles.py, the passes over rows in rows.py, their launches in launch.py.  Times: docs/kernels.md.
"""

import torch
from torch import Tensor

from ..collectives import group_name, named_group, rank_world
from ..common import cdiv
from .launch import PAD, Form, classes_of, loss_parts, padded_width, prepare, row_gradients, row_losses, tile_dtype


def forward(z, labels, temperature, decoupled, normalize, group):
    """-> loss, v, inverse norms, all rows' weights w, and of labels one over the number of each own row's positives and
    all rows' classes (empty without labels)."""
    m = z.shape[0]
    rank, world = rank_world(group)
    form = Form(temperature, normalize, diagonal=True, decoupled=decoupled, half=m // 2)
    v, inv, _ = prepare(z, None, form, group)
    classes, count = (None, None) if labels is None else classes_of(labels, len(v))
    loss = loss_parts(1, m, z.device)
    w, a = row_losses(v[rank * m :], v, m, m * world, rank * m, classes, count, form, loss[0], 1 / m, group)
    return loss.sum(), v, inv, w, a, v.new_empty(0, dtype=torch.int32) if labels is None else classes


def backward(grad, z, v, inv, w, a, classes, temperature, decoupled, normalize, group):
    m = z.shape[0]
    rank, world = rank_world(group)
    form = Form(temperature, normalize, diagonal=True, decoupled=decoupled, half=m // 2)
    own, classes = slice(rank * m, (rank + 1) * m), classes if len(classes) else None
    return row_gradients(
        grad, z, inv, v[own], v, w[own], w, a, m * world, rank * m, classes, form, 1 / (m * temperature)
    )


@torch.library.custom_op("fastssl::ntxent", mutates_args=())
def ntxent_op(
    z: Tensor, labels: Tensor | None, temperature: float, decoupled: bool, normalize: bool, group: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return forward(z, labels, temperature, decoupled, normalize, named_group(group))


@ntxent_op.register_fake
def _(z, labels, temperature, decoupled, normalize, group):
    m, d = z.shape
    n = m * rank_world(named_group(group))[1]
    dtype = tile_dtype(z.dtype, normalize)
    f32 = {"dtype": torch.float32}
    v = z.new_empty((cdiv(n, PAD) * PAD, padded_width(d, dtype)), dtype=dtype)
    a, classes = (0, 0) if labels is None else (m, len(v))
    return (
        z.new_empty((), **f32),
        v,
        z.new_empty(m, **f32),
        z.new_empty(len(v), **f32),
        z.new_empty(a, **f32),
        z.new_empty(classes, dtype=torch.int32),
    )


@torch.library.custom_op("fastssl::ntxent_backward", mutates_args=())
def ntxent_backward_op(
    grad: Tensor,
    z: Tensor,
    v: Tensor,
    inv: Tensor,
    w: Tensor,
    a: Tensor,
    classes: Tensor,
    temperature: float,
    decoupled: bool,
    normalize: bool,
    group: str,
) -> Tensor:
    return backward(grad, z, v, inv, w, a, classes, temperature, decoupled, normalize, named_group(group))


@ntxent_backward_op.register_fake
def _(grad, z, v, inv, w, a, classes, temperature, decoupled, normalize, group):
    return torch.empty(z.shape, dtype=z.dtype, device=z.device)


def _setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # zeros for the outputs that are only saved would cost memory and time
    z, _, *ctx.rest = inputs
    ctx.save_for_backward(z, *output[1:])


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 6
    return ntxent_backward_op(grad, *ctx.saved_tensors, *ctx.rest), None, None, None, None, None


ntxent_op.register_autograd(_backward, setup_context=_setup)


def ntxent(z, temperature, labels, decoupled, normalize, group):
    return ntxent_op(z, labels, float(temperature), decoupled, normalize, group_name(group))[0]
