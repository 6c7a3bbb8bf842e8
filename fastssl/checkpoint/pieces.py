"""Tensors that several ranks saved in pieces, so that any number of ranks can read any part of them.

A piece named "NAME@START" in a rank's file holds the rows of the tensor NAME from START on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from fastssl.files import untrusted


def piece(name: str, start: int) -> str:
    return f"{name}@{start}"


class SavedTensor:
    """A tensor in consecutive pieces; `[a:b]` reads these rows of it."""

    def __init__(self, name: str):
        self.name = name
        self._parts: list[tuple[int, safetensors.safe_open, str]] = []  # start, file, its key
        self.shape: tuple[int, ...] = (0,)

    def add(self, start: int, file: safetensors.safe_open, key: str) -> None:
        """The next piece; ValueError unless it begins where the last one ended."""
        shape = tuple(file.get_slice(key).get_shape())
        if not shape or start != self.shape[0] or (self._parts and shape[1:] != self.shape[1:]):
            raise ValueError(f"the pieces of {self.name} do not follow each other at {start}")
        self._parts.append((start, file, key))
        self.shape = (start + shape[0], *shape[1:])

    def __getitem__(self, rows: slice) -> Tensor:
        begin, end, _ = rows.indices(self.shape[0])
        stops = [start for start, *_ in self._parts[1:]] + [self.shape[0]]
        found = [
            file.get_slice(key)[max(begin - start, 0) : max(min(end, stop) - start, 0)]
            for (start, file, key), stop in zip(self._parts, stops)
            if start < end and stop > begin
        ]
        return torch.cat(found or [self._parts[0][1].get_slice(self._parts[0][2])[0:0]])


class Pieces(Mapping):
    """The tensors in the files of all ranks, by name."""

    def __init__(self, paths: Iterable[Path]):
        found = []
        for path in paths:
            untrusted.regular_file_size(path)
            file = safetensors.safe_open(path, "pt")
            for key in file.keys():  # noqa: SIM118 (not a dictionary)
                name, _, start = key.rpartition("@")
                found.append((name, int(start), file, key))
        self._tensors: dict[str, SavedTensor] = {}
        for name, start, file, key in sorted(found, key=lambda item: item[:2]):
            self._tensors.setdefault(name, SavedTensor(name)).add(start, file, key)

    def __getitem__(self, name: str) -> SavedTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
