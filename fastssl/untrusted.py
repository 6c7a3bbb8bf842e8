"""Readers of files that anyone may have made: what they return is checked, and everything else is a ValueError.

Nothing in these files runs.  A file that torch.save wrote is read by PyTorch's restricted unpickler
(`weights_only=True`), and every object in it must then be of one of the types named here.
"""

from __future__ import annotations

import os
import pickle
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class CodeRefused(ValueError):
    """The file names a function or a class that is not allowed; an ordinary unpickler would have called it."""


def regular_file(path: str | Path) -> int:
    """The size of a regular file in bytes; ValueError for a folder, a pipe, a device or nothing at all."""
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise ValueError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path} is {_kind(found.st_mode)}, not a regular file")
    return found.st_size


def _kind(mode: int) -> str:
    names = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return names.get(stat.S_IFMT(mode), "a device")


def one_line(error: BaseException, limit: int = 200) -> str:
    """An exception as part of a one-line message."""
    text = " ".join(str(error).split())
    return (f"{type(error).__name__}: {text}" if text else type(error).__name__)[:limit]


def read_pt(path: str | Path, allow: Sequence[type] = ()) -> Any:
    """What torch.save wrote to `path`, on the CPU: numbers, strings, dense tensors and containers of them.

    `allow`: further classes that may occur; of their objects the attributes are set and nothing is called.
    CodeRefused for any other class or function, ValueError for a damaged file and for other tensors."""
    import torch  # a second to import, and not every user of this module needs it

    regular_file(path)
    try:
        with torch.serialization.safe_globals(list(allow)):
            value = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL ([\w.]+)|Unsupported \w+ \d+", str(error))
        what = (culprit[1] or culprit[0]) if culprit else one_line(error)
        raise CodeRefused(f"{path} is refused: it is not a pickle of tensors alone ({what}), and reading any other can "
                          "run code") from None
    except Exception as error:  # a damaged file raises nearly anything
        if "TorchScript" in str(error):
            raise ValueError(f"{path} is a TorchScript archive: save its state_dict() instead") from None
        raise ValueError(f"{path} is not a complete PyTorch file ({one_line(error)})") from None
    check_plain(value, str(path), allow)
    return value


def check_plain(value: Any, path: str, allow: Sequence[type] = ()) -> None:
    """ValueError unless all that `value` holds is a number, a string, a dense tensor, or an object of `allow`."""
    import torch

    leaves = (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)
    todo, seen = [value], set()
    while todo:  # a stack: nesting may be deeper than Python's recursion
        item = todo.pop()
        if isinstance(item, torch.Tensor):
            _check_tensor(item, path)
        elif not isinstance(item, leaves):
            if id(item) in seen:
                continue
            seen.add(id(item))
            if isinstance(item, dict):
                todo += [*item.keys(), *item.values()]
            elif isinstance(item, (list, tuple, set)):
                todo += item
            elif not isinstance(item, type) and isinstance(item, tuple(allow)):
                todo += getattr(item, "__dict__", {}).values()
            else:
                raise CodeRefused(f"{path} is refused: it holds {item!r:.60}, not a tensor, a number or a string")


def _check_tensor(tensor: Any, path: str) -> None:
    import torch

    kind = None
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "a sparse or nested tensor"
    elif tensor.is_quantized:
        kind = "a quantised tensor"
    elif tensor.device.type != "cpu":
        kind = f"a tensor without values (device {tensor.device.type!r})"
    elif tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        kind = f"a tensor of shape {tuple(tensor.shape)} over {tensor.untyped_storage().nbytes()} bytes"
    if kind:
        raise ValueError(f"{path} holds {kind}: only dense tensors are read")
