"""Checks of a file of torch.save before torch.load reads it: it must neither be compressed nor nested without limit.

PyTorch's restricted unpickler runs no code, but it decompresses members of the zip without a limit, and it hashes keys:
the hash of tuples inside each other recurses in C and crashes the process at some 100,000 levels.
"""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path
from typing import IO, Any

MAX_DEPTH = 100  # tuples inside each other; torch.save writes about four
LEGACY_PICKLES = 5  # of a file without a zip: magic number, version, system, object, keys of the storages


def check(path: str | Path, size: int) -> None:
    """ValueError for a file of `size` bytes that would fill the memory or crash the process.  Other damage is left to
    torch.load."""
    try:
        zipped = zipfile.is_zipfile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is not a complete PyTorch file ({error})") from None
    if not zipped:
        with open(path, "rb") as file:
            for _ in range(LEGACY_PICKLES):
                if not _check_nesting(file, path):
                    return
        return
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # about a dozen types on damaged files
        raise ValueError(f"{path} is not a complete PyTorch file ({type(error).__name__})") from None
    with archive:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise ValueError(f"{path} is a TorchScript archive: save its state_dict() instead")
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED or member.file_size > size:
                raise ValueError(
                    f"{path} is refused: {member.filename!r:.60} in it is compressed, to unpack to "
                    f"{member.file_size} bytes; torch.save compresses nothing"
                )
        for member in archive.infolist():
            if member.filename.endswith("data.pkl"):
                try:
                    pickled = archive.open(member)
                except Exception as error:
                    raise ValueError(f"{path} is not a complete PyTorch file ({type(error).__name__})") from None
                with pickled:
                    _check_nesting(pickled, path)


def _check_nesting(file: IO[bytes], path: str | Path) -> bool:
    """Whether a pickle was read to its end.  `stack` has, for each item of the unpickler's stack, how many tuples are
    inside each other in it."""
    stack: list[int] = []
    marks: list[list[int]] = []
    memo: dict[Any, int] = {}
    try:
        for op, arg, _ in pickletools.genops(file):
            name = op.name
            if name == "MARK":
                marks.append(stack)
                stack = []
            elif name in ("TUPLE", "LIST", "DICT", "APPENDS", "SETITEMS"):
                items, stack = stack, marks.pop()
                if name in ("TUPLE", "LIST", "DICT"):
                    stack.append(1 + max(items, default=0) if name == "TUPLE" else 0)
            elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
                count = int(name[-1])
                stack[-count:] = [1 + max(stack[-count:])]
            elif name in ("REDUCE", "NEWOBJ"):  # the object may be a tuple of its arguments
                stack[-2:] = [stack[-1]]
            elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
                memo[arg] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET", "GET"):
                stack.append(memo[arg])
            elif name in ("APPEND", "BUILD", "SETITEM"):
                del stack[-2 if name == "SETITEM" else -1 :]
            elif name == "BINPERSID":
                stack[-1] = 0
            elif name == "STOP":
                return True
            elif op.stack_before or len(op.stack_after) > 1:
                return False  # torch.load refuses it
            elif op.stack_after:
                stack.append(0)
            if stack and stack[-1] > MAX_DEPTH:
                break
        else:
            return False
    except Exception:  # damaged; torch.load stops at the same place
        return False
    raise ValueError(f"{path} is refused: it has more than {MAX_DEPTH} tuples inside each other")
