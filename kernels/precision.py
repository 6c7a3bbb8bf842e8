"""In which dtype the kernels multiply matrices, and how precisely."""

import torch
from torch import Tensor


def tile_dtype(dtype: torch.dtype, normalize: bool) -> torch.dtype:
    """The dtype of tiles for rows of `dtype`: float16 for unit rows, which is 8 times more precise than bfloat16, twice
    as fast as TF32, and cannot overflow as |u| <= 1.

    float32 rows stay float32 while torch.get_float32_matmul_precision() is "highest" (the default).
    """
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return dtype
    return torch.float16 if normalize else dtype


def input_precision() -> str:
    """tl.dot's option of that name."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def matmul_float32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with float32 sums and a float32 result."""
    if a.dtype == torch.float32:
        return a @ b
    if a.device.type == "cpu":
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)
