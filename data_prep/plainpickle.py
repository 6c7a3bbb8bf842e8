"""A reader for the pickles of CIFAR that executes no code: dictionaries, lists, numbers, bytes, arrays of integers.

`pickletools` splits the file into operations, and this module carries out the few that such a file needs, on a stack
of plain values.  It looks up no class and calls no function.  NumPy arrays are made from their bytes, and only of
integers: the bytes of an array of objects are addresses.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastssl.files import untrusted

MAX_OPERATIONS = 5_000_000  # CIFAR-100's largest file has 0.4 million
INTEGERS = {f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)}
NUMBERS = {"BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4"}
TEXTS = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
OLD_TEXTS = {"STRING", "BINSTRING", "SHORT_BINSTRING"}  # bytes of Python 2
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
ARRAYS = {"numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct"}
KEYS = (bytes, str, int)


@dataclass
class _Name:
    """A class or function that the file names: "module name"."""

    text: str


@dataclass
class _Array:
    value: np.ndarray | None = None  # set by the BUILD that follows


def read_pickle(data: bytes, name: str) -> dict:
    """The dictionary in a CIFAR batch.  ValueError if it is damaged, has other content or would run code."""
    try:
        value = _run(data)
    except Exception as error:  # pickletools on a damaged file: five types
        text = str(error) if type(error) is ValueError else untrusted.one_line(error)
        raise ValueError(f"{name} is refused as a CIFAR pickle: {' '.join(text.split())[:200]}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} is refused as a CIFAR pickle: it holds a {type(value).__name__}")
    return {key: v.value if isinstance(v, _Array) else v for key, v in value.items()}


def _run(data: bytes) -> Any:
    """The value of a pickle."""
    stack: list[Any] = []
    marks: list[list[Any]] = []
    memo: dict[Any, Any] = {}
    arg: Any
    for number, (op, arg, _) in enumerate(pickletools.genops(data)):
        code = op.name
        if number >= MAX_OPERATIONS:
            raise ValueError(f"it has more than {MAX_OPERATIONS} operations")
        if code in NUMBERS or code in TEXTS:
            stack.append(arg)
        elif code in OLD_TEXTS:
            stack.append(arg.encode("latin1"))
        elif code in CONSTANTS:
            stack.append(CONSTANTS[code])
        elif code == "MARK":
            marks.append(stack)
            stack = []
        elif code in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[code]())
        elif code in ("TUPLE", "LIST", "DICT", "APPENDS", "SETITEMS"):
            items, stack = stack, marks.pop()
            if code in ("TUPLE", "LIST"):
                stack.append((tuple if code == "TUPLE" else list)(items))
                continue
            if code == "DICT":
                stack.append({})
            _extend(stack[-1], items, code == "APPENDS")
        elif code in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(code[-1])
            stack[-count:] = [tuple(_last(stack, count))]
        elif code in ("APPEND", "SETITEM"):
            items = [stack.pop() for _ in range(1 if code == "APPEND" else 2)][::-1]
            _extend(stack[-1], items, code == "APPEND")
        elif code in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if code == "MEMOIZE" else arg] = stack[-1]
        elif code in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif code == "GLOBAL":
            stack.append(_Name(arg))
        elif code == "STACK_GLOBAL":
            stack[-2:] = [_Name(" ".join(map(str, _last(stack, 2))))]
        elif code == "REDUCE":
            stack[-2:] = [_call(*_last(stack, 2))]
        elif code == "BUILD":
            _build(*_last(stack, 2))
            stack.pop()
        elif code == "STOP":
            return stack.pop()
        elif code == "POP":
            stack.pop()
        elif code not in ("PROTO", "FRAME"):
            raise ValueError(f"it has the operation {code}, which CIFAR files do not have")


def _last(stack: list, count: int) -> list:
    if len(stack) < count:
        raise ValueError("an operation takes more values than there are")
    return stack[-count:]


def _extend(target: Any, items: list, append: bool) -> None:
    """Append `items` to a list, or set them as keys and values of a dictionary in turn."""
    if append and type(target) is list:
        target.extend(items)
    elif append or type(target) is not dict or len(items) % 2:
        raise ValueError(f"it adds items to a {type(target).__name__}")
    elif not all(type(key) in KEYS for key in items[::2]):  # hashing a deeply nested tuple overflows C's stack
        raise ValueError("it has a key that is not text or a number")
    else:
        target.update(zip(items[::2], items[1::2]))


def _call(what: Any, args: Any) -> Any:
    text = what.text if isinstance(what, _Name) else type(what).__name__
    if text in ARRAYS:
        return _Array()
    if text == "numpy dtype" and type(args) is tuple and args and _text(args[0]) in INTEGERS:
        return np.dtype("<" + _text(args[0]))
    if text == "_codecs encode" and type(args) is tuple and len(args) == 2 and type(args[0]) is str:
        if args[1] not in ("latin1", "latin-1"):  # how Python 3 writes bytes in protocol 2
            raise ValueError(f"it uses the codec {args[1]!r:.40}")
        return args[0].encode("latin1")
    if text == "numpy dtype":
        raise ValueError(f"it has an array of type {args!r:.40}; only arrays of whole numbers are read")
    raise ValueError(f"it would run {text.replace(' ', '.')}")


def _build(target: Any, state: Any) -> None:
    if isinstance(target, np.dtype):
        if type(state) is not tuple or len(state) < 2 or _text(state[1]) not in ("<", "|", "="):
            raise ValueError("it has integers of another byte order or structure")
        return
    if not isinstance(target, _Array) or type(state) is not tuple or len(state) != 5:
        raise ValueError(f"it sets the state of a {type(target).__name__}")
    _, shape, dtype, fortran, content = state
    if (
        not isinstance(dtype, np.dtype)
        or type(content) is not bytes
        or type(shape) is not tuple
        or not all(type(n) is int and 0 <= n < 1 << 40 for n in shape)
        or len(shape) > 8
    ):
        raise ValueError("it has an array that is not of whole numbers")
    target.value = np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")


def _text(value: Any) -> str:
    return value.decode("latin1") if type(value) is bytes else value if type(value) is str else ""
