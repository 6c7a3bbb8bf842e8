"""What every op shares: which implementation runs, input checks, and the row normalisation that all of them mean.

A zero row has no direction: it stays zero and gets a zero gradient (F.normalize would send it 1e12 times its gradient).
"""

import torch

IMPLS = ("auto", "reference", "triton")
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def choose(impl: str, x: torch.Tensor) -> str:
    """ "reference" or "triton".  "auto" is Triton on CUDA and the reference elsewhere; what cannot run is an error."""
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


@torch.compiler.assume_constant_result  # Dynamo cannot trace the knob
def _interpreting() -> bool:
    import triton

    if triton.knobs.runtime.interpret:
        from .interpreter import repair

        repair()
    return triton.knobs.runtime.interpret


def check_rows(op: str, temperature: float | None = None, **tensors: torch.Tensor) -> None:
    """Matrices of floats, one device, one width; a positive temperature.  Raises ValueError naming what is wrong."""
    if temperature is not None and not temperature > 0:
        raise ValueError(f"{op}: temperature={temperature}: must be above 0")
    first = None
    for name, x in tensors.items():
        if x.ndim != 2:
            raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}: expected (rows, dim)")
        if not x.is_floating_point():
            raise ValueError(f"{op}: {name} has dtype {x.dtype}: expected a floating-point type")
        if first is None:
            first = (name, x)
        elif x.shape[1] != first[1].shape[1]:
            raise ValueError(f"{op}: {name} is {x.shape[1]} wide, {first[0]} is {first[1].shape[1]}: widths must agree")
        elif x.device != first[1].device:
            raise ValueError(f"{op}: {name} is on {x.device}, {first[0]} is on {first[1].device}: use one device")


def check_triton_dtype(op: str, **tensors: torch.Tensor) -> None:
    for name, x in tensors.items():
        if x.dtype not in TRITON_DTYPES:
            raise ValueError(
                f"{op}: the Triton kernel takes float32, float16 or bfloat16, {name} is {x.dtype}; use impl='reference'"
            )


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def l2_normalize(x: torch.Tensor) -> torch.Tensor:
    """Rows of unit length, in float32 or float64; zero rows stay zero, in the gradient too."""
    x = at_least_float32(x)
    square = x.square().sum(-1, keepdim=True)
    alive = square > 0
    return x * torch.where(alive, torch.where(alive, square, 1.0).rsqrt(), 0.0)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def pow2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def processors(device: torch.device) -> int:
    """Multiprocessors to fill.  On a CPU a few are pretended, so that small tests split work too; meta is an H200."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132 if device.type == "meta" else 4


PRETENDED = {"capability": 90}  # of meta tensors, which the build tests compile for


def capability(device: torch.device) -> int:
    """80 for an A100, 90 for an H100 or H200."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return 10 * major + minor
    return PRETENDED["capability"]
