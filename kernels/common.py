"""What the public functions and the reference implementations share: choosing an implementation, checking the inputs,
and normalising rows.

A zero row stays zero and gets a zero gradient (F.normalize would multiply its gradient by 1e12).
"""

from typing import Literal, get_args

import torch
from torch import Tensor

Impl = Literal["auto", "reference", "triton"]
IMPLS = get_args(Impl)
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def choose(impl: Impl, x: Tensor) -> str:
    """The implementation to use for x: "reference" or "triton".

    "auto" is Triton on CUDA and the reference elsewhere.  Raises ValueError if the requested one cannot run.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r}: choose one of {', '.join(IMPLS)}")
    if impl == "auto":
        return "triton" if x.is_cuda else "reference"
    if impl == "triton" and not x.is_cuda and not _interpreting():
        raise ValueError(
            f"impl='triton' needs a CUDA tensor, got one on {x.device}; use impl='auto', "
            "or set TRITON_INTERPRET=1 before the first import of triton to run it (slowly) on the CPU"
        )
    return impl


@torch.compiler.assume_constant_result  # Dynamo cannot trace triton.knobs
def _interpreting() -> bool:
    import triton

    if triton.knobs.runtime.interpret:
        from .interpreter import patch_bfloat16

        patch_bfloat16()
    return triton.knobs.runtime.interpret


def check_rows(op: str, temperature: float | None = None, **tensors: Tensor) -> None:
    """ValueError unless all are floating-point matrices of one width on one device, and the temperature is above 0."""
    if temperature is not None and not temperature > 0:
        raise ValueError(f"{op}: temperature={temperature}: must be above 0")
    first_name, first = next(iter(tensors.items()))
    for name, x in tensors.items():
        if x.ndim != 2:
            raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}: expected (rows, dim)")
        if not x.is_floating_point():
            raise ValueError(f"{op}: {name} has dtype {x.dtype}: expected a floating-point type")
        if x.shape[1] != first.shape[1]:
            raise ValueError(f"{op}: {name} is {x.shape[1]} wide, {first_name} is {first.shape[1]}: widths must agree")
        if x.device != first.device:
            raise ValueError(f"{op}: {name} is on {x.device}, {first_name} is on {first.device}: use one device")


def check_triton_dtype(op: str, **tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.dtype not in TRITON_DTYPES:
            raise ValueError(
                f"{op}: the Triton kernel takes float32, float16 or bfloat16, {name} is {x.dtype}; use impl='reference'"
            )


def at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def l2_normalize(x: Tensor) -> Tensor:
    """Rows of unit length, in float32 or float64; zero rows stay zero and get a zero gradient."""
    x = at_least_float32(x)
    square = x.square().sum(-1, keepdim=True)
    nonzero = square > 0
    return x * torch.where(nonzero, torch.where(nonzero, square, 1.0).rsqrt(), 0.0)
