"""A method's forward under torch.compile, and what happens if that fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from fastssl import dist
from fastssl.files.untrusted import one_line

Forward = Callable[..., dict[str, Tensor]]


def compile_forward(forward: Forward, required: bool) -> Forward:
    """`forward` compiled by inductor with its backward, when it is first called and for every new shape.

    If that fails: ValueError where it is `required`; otherwise the reason is printed once, and the graph runs
    uncompiled.  A graph is compiled before any of it runs, so statistics and random states are those before the call.
    """
    failed = False

    def compile_graph(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        nonlocal failed
        if failed:
            return graph.forward
        try:
            # the backward, too: by default it is compiled when it first runs, and the forward would have run before
            with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
                return torch._dynamo.lookup_backend("inductor")(graph, inputs)
        except Exception as error:  # of a compiler or of a pass of inductor
            if required:
                raise
            failed = True
            if dist.is_main():
                print(f"speed.compile=auto: the forward is not compiled: {reason(error)}")
            return graph.forward

    fast = torch.compile(forward, backend=compile_graph)
    suppress = torch._dynamo.config.patch(suppress_errors=not required)  # errors of Dynamo itself: it prints them

    def call(*args: Any) -> dict[str, Tensor]:
        try:
            with suppress:
                return fast(*args)
        except TorchDynamoException as error:
            raise ValueError(
                f"speed.compile=on: the forward cannot be compiled; use speed.compile=off ({reason(error)})"
            ) from error

    return call


def reason(error: BaseException) -> str:
    """The error that a backend raised, in one line without the advice that Dynamo adds."""
    return one_line(getattr(error, "inner_exception", error), 300)
