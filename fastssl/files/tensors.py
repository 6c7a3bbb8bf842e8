"""Files of tensors in the safetensors format (https://github.com/huggingface/safetensors).

The same tensors and metadata give the same bytes.  Writing releases Python's lock, so that another thread can train.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 4 << 20  # bytes
NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


def blocks(state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Iterator[bytes | memoryview]:
    """The bytes of a file with these tensors, in blocks of at most BLOCK bytes after the header."""
    names = sorted(state, key=lambda name: (-state[name].element_size(), name))  # every tensor is then aligned
    header: dict[str, dict] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name in names:
        size = state[name].numel() * state[name].element_size()
        kind = str(state[name].dtype).removeprefix("torch.")
        if kind not in NAMES:
            raise ValueError(f"{name} has the type {kind}, which is none of {', '.join(NAMES)}")
        header[name] = {"dtype": NAMES[kind], "shape": list(state[name].shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        data = tensor_bytes(state[name])
        for start in range(0, len(data), BLOCK):
            yield data[start : start + BLOCK]


def tensor_bytes(tensor: Tensor) -> memoryview:
    import torch  # takes a second, and not every user of `files` needs it

    return memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
