"""InfoNCE whose keys get no gradient as a custom op, by kernels/one_pass: 4 M N D floating-point operations for M
queries, N keys and D features, no logits in memory.

Times: docs/kernels.md.
"""

import torch
from torch import Tensor

from ..collectives import Group, group_from_name, group_name
from ..one_pass import loss_and_gradient, register_ready_gradient


@torch.library.custom_op("fastssl::infonce", mutates_args=())
def infonce_op(
    q: Tensor, k: Tensor, queue: Tensor | None, temperature: float, normalize: bool, group: str
) -> tuple[Tensor, Tensor]:
    return loss_and_gradient(q, k, queue, temperature, normalize, group_from_name(group), normalize_k=normalize)


@infonce_op.register_fake
def _(
    q: Tensor, k: Tensor, queue: Tensor | None, temperature: float, normalize: bool, group: str
) -> tuple[Tensor, Tensor]:
    return q.new_empty((), dtype=torch.float32), torch.empty(q.shape, dtype=torch.float32, device=q.device)


register_ready_gradient(infonce_op, num_inputs=6)


def infonce(q: Tensor, k: Tensor, queue: Tensor | None, temperature: float, normalize: bool, group: Group) -> Tensor:
    queue = None if queue is None else queue.detach()
    return infonce_op(q, k.detach(), queue, float(temperature), normalize, group_name(group))[0]
