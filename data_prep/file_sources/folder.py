"""A folder with all its sub-folders."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

from .base import FileRef, FileSource


class Folder(FileSource):
    archive = False

    def __init__(self, path: Path):
        super().__init__(path)
        visited = set()  # the real paths of folders, to stop at a link to a parent
        for top, folders, files in os.walk(path, followlinks=True, onerror=_raise):
            real = os.path.realpath(top)
            if real in visited:
                raise ValueError(f"{top} is a link to a folder that was read already ({real}): remove the link")
            visited.add(real)
            folders[:] = sorted(f for f in folders if not f.startswith("."))
            base = Path(top).relative_to(path).as_posix()
            for name in files:
                self._add(name if base == "." else f"{base}/{name}")
        self.names.sort(key=lambda name: name.split("/"))

    def ref(self, name: str) -> FileRef:
        return FileRef(str(self.path / name))


def _raise(error: OSError) -> NoReturn:
    raise error
