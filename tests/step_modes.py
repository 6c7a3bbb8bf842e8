"""What a training step does beside arithmetic, seen by modes of PyTorch's dispatcher.  Not a test."""

import gc
import weakref

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = {  # that wait for the device, or whose result's shape depends on values
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "repeat_interleave.Tensor",
}


def reads(func, args: tuple) -> str | None:
    """What of the device the host waits for in a call of `func`; None: nothing."""
    name, overload = func._schema.name.split("::")[1], func._schema.overload_name
    if {name, f"{name}.{overload}"} & READS:
        return f"the step reads from the device: {func}"
    masks = name in ("index", "index_put_", "index_put") and any(
        i is not None and i.dtype == torch.bool for i in args[1]
    )
    return f"the step reads how much a mask takes: {func}" if masks else None


class NoReads(TorchDispatchMode):
    """Fails where the host reads a tensor, or sends one to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = reads(func, args)
        assert found is None, found
        return func(*args, **(kwargs or {}))


class Counts(TorchDispatchMode):
    """`ops`: calls that do work on the device, where each is a kernel or more (views of memory and empty memory are
    not counted); `reads`: what the host waited for; `survivors()`: tensors made inside that are still alive."""

    FREE = ("empty", "empty_like", "empty_strided", "new_empty", "detach", "lift_fresh", "alias")

    def __init__(self):
        super().__init__()
        self.ops, self.reads, self._made = 0, [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = reads(func, args)
        self.reads += [found] if found else []
        out = func(*args, **(kwargs or {}))
        if not func.is_view and func._schema.name.split("::")[1] not in self.FREE:
            self.ops += 1
        if not func.is_view and not func._schema.is_mutable:
            made = out if isinstance(out, tuple | list) else [out]
            self._made += [(weakref.ref(x), str(func)) for x in made if isinstance(x, torch.Tensor)]
        return out

    def survivors(self) -> list[str]:
        """The ops that made them.  Call it after all of the step's results are dropped."""
        gc.collect()
        return [f"{name} {tuple(x().shape)}" for x, name in self._made if x() is not None]


class NoCopies(TorchFunctionMode):
    """Fails where a tensor would come from the device to the host or be made of the host's numbers, for both of which
    the host waits; a CPU has no copies that a dispatch mode could see."""

    NAMES = ("cpu", "numpy", "tolist", "tensor", "new_tensor", "from_numpy", "pin_memory")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        to_host = name == "to" and any(str(a).startswith("cpu") for a in (*args[1:], *(kwargs or {}).values()))
        assert name not in self.NAMES and not to_host, f"the step copies between host and device: {name}"
        return func(*args, **(kwargs or {}))
