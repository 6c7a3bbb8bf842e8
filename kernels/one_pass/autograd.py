"""Autograd of a custom op whose forward computes the gradient, too."""

from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef


def register_ready_gradient(op: CustomOpDef, num_inputs: int) -> None:
    """For an op that returns (loss, gradient with respect to its first input in float32)."""

    def setup(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.set_materialize_grads(False)  # zeros for the gradient of the second output would cost memory and time
        ctx.dtype = inputs[0].dtype
        ctx.save_for_backward(output[1])

    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        others = (None,) * (num_inputs - 1)
        if grad is None:
            return None, *others
        ready = ctx.saved_tensors[0]
        if ctx.dtype != ready.dtype:  # multiplied and rounded in one launch
            return torch.mul(ready, grad, out=torch.empty_like(ready, dtype=ctx.dtype)), *others
        return grad * ready, *others

    op.register_autograd(backward, setup_context=setup)
