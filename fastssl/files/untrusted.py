"""Readers of untrusted files.  What they return is checked; everything else is a ValueError.

Nothing in these files is executed.  A file that torch.save wrote is read by PyTorch's restricted unpickler
(`weights_only=True`), and every object in it must then be of one of the types named here.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastssl.files import torch_file

JSON_BYTES = 64 << 20  # a data card of 21,000 classes has 0.5 MB


class CodeRefused(ValueError):
    """The file names a function or a class that is not allowed; an ordinary unpickler would have called it."""


def regular_file_size(path: str | Path) -> int:
    """The size of a regular file in bytes; ValueError for a folder, a pipe, a device, or a path that does not exist."""
    try:
        info = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise ValueError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(info.st_mode):
        names = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        raise ValueError(f"{path} is {names.get(stat.S_IFMT(info.st_mode), 'a device')}, not a regular file")
    return info.st_size


def one_line(error: BaseException, limit: int = 200) -> str:
    """An exception as part of a one-line message."""
    text = " ".join(str(error).split())
    return (f"{type(error).__name__}: {text}" if text else type(error).__name__)[:limit]


def read_pt(path: str | Path, allow: Sequence[type] = ()) -> Any:
    """What torch.save wrote to `path`, on the CPU: numbers, strings, dense tensors and containers of them.

    `allow`: further classes that may occur; attributes of their objects are set, and none of their code is called.
    CodeRefused for any other class or function, ValueError for a damaged file and for other tensors."""
    import torch  # takes a second, and not every user of this module needs it

    torch_file.check(path, regular_file_size(path))
    try:
        with torch.serialization.safe_globals(list(allow)):
            value = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        text = " ".join(str(error).split())
        patterns = r"GLOBAL ([\w.]+)", r"(Unsupported \w+ \d+)", r"WeightsUnpickler error: ([^.]{,100})"
        found = next(filter(None, (re.search(pattern, text) for pattern in patterns)), None)
        what = found[1] if found else one_line(error)
        raise CodeRefused(
            f"{path} is refused: it is not a pickle of tensors alone ({what}), and reading any other can run code"
        ) from None
    except Exception as error:  # of nearly any type, from a damaged file
        raise ValueError(f"{path} is not a complete PyTorch file ({one_line(error)})") from None
    check_plain(value, str(path), allow)
    return value


def check_plain(value: Any, path: str, allow: Sequence[type] = ()) -> None:
    """ValueError unless all that `value` holds is a number, a string, a dense tensor, or an object of `allow`."""
    import torch

    leaves = (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)
    stack, visited = [value], set()
    while stack:  # a stack, because nesting may exceed Python's recursion limit
        item = stack.pop()
        if isinstance(item, torch.Tensor):
            _check_tensor(item, path)
        elif not isinstance(item, leaves):
            if id(item) in visited:
                continue
            visited.add(id(item))
            if isinstance(item, dict):
                stack += [*item.keys(), *item.values()]
            elif isinstance(item, (list, tuple, set)):
                stack += item
            elif not isinstance(item, type) and isinstance(item, tuple(allow)):
                stack += getattr(item, "__dict__", {}).values()
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


def parse_json(text: str | bytes, name: str | Path) -> Any:
    """The value of `text`, which the file `name` holds."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also bytes that are not UTF-8, and huge integers
        why = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{name} is not valid JSON: {why}") from None


def read_json(path: str | Path, max_bytes: int = JSON_BYTES) -> Any:
    """The value in a JSON file of at most `max_bytes` bytes."""
    return parse_json(_read_bytes(path, max_bytes), path)


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text file in UTF-8 of at most JSON_BYTES bytes, without empty ones and spaces around them."""
    try:
        text = _read_bytes(path, JSON_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file: {error.reason} for UTF-8 at byte {error.start}") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def _read_bytes(path: str | Path, max_bytes: int) -> bytes:
    size = regular_file_size(path)
    if size > max_bytes:
        raise ValueError(f"{path} has {size} bytes: the largest file that is read here has {max_bytes}")
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def read_safetensors(path: str | Path, tensors: bool = True) -> tuple[dict[str, str], dict]:
    """The metadata and, if `tensors`, the tensors of a .safetensors file."""
    import safetensors

    regular_file_size(path)
    try:
        with safetensors.safe_open(path, "pt") as file:
            meta = file.metadata() or {}
            return meta, {key: file.get_tensor(key) for key in file.keys()} if tensors else {}  # noqa: SIM118
    except Exception as error:  # of nearly any type: a damaged header, or a data type that PyTorch lacks
        raise ValueError(f"{path} is not a complete safetensors file: {one_line(error)}") from None
