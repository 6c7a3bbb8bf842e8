"""What folders and archives share: the class `FileSource`, limits of size, and safe names of members."""

from __future__ import annotations

import lzma
import os
import posixpath
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

# What tarfile, zipfile and the decompressors raise on damaged input; RuntimeError for encrypted members.
ARCHIVE_ERRORS = (
    tarfile.TarError,
    zipfile.BadZipFile,
    lzma.LZMAError,
    zlib.error,
    EOFError,
    OSError,
    RuntimeError,
    NotImplementedError,
    ValueError,
    struct.error,
    IndexError,
    KeyError,
    TypeError,  # from tarfile, for a gzip header that is cut short
    OverflowError,
)
MAX_BYTES = 512 << 20  # of one encoded image; the largest photographs have some 100 MB
MAX_LINKS = 40  # of a chain of symbolic links; Linux has the same limit


class RefusedArchive(ValueError):
    """An archive with a member that is not allowed.  The message needs no addition."""


class Ref(Protocol):
    """A file that can be read later, also in another process."""

    def read(self) -> bytes: ...


def check_size(size: int) -> None:
    """OSError for more bytes than an image may have: a few kilobytes of archive can declare 10 GiB of zeros."""
    if size > MAX_BYTES:
        raise OSError(f"it has {size / 2**20:.0f} MiB, at most {MAX_BYTES >> 20} MiB are read")


@dataclass(frozen=True)
class FileRef:
    path: str

    def read(self) -> bytes:
        descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)  # otherwise opening a pipe waits for a writer
        with open(descriptor, "rb") as file:
            info = os.fstat(descriptor)
            if not stat.S_ISREG(info.st_mode):
                raise OSError("not a regular file")
            check_size(info.st_size)
            return file.read(info.st_size)


@contextmanager
def archive_errors(path: Path) -> Iterator[None]:
    """Context manager: errors of a damaged archive are a ValueError that names it."""
    try:
        yield
    except RefusedArchive:
        raise
    except ARCHIVE_ERRORS as error:
        raise ValueError(f"cannot read the archive {path}: {error or type(error).__name__}") from error


@dataclass
class FileSource:
    path: Path
    names: list[str] = field(default_factory=list)
    hidden: int = 0  # files such as .DS_Store and __MACOSX/..., and links to files that are not in the archive
    members: dict[str, Any] = field(default_factory=dict)  # of an archive: name of a file -> where it is
    links: dict[str, str] = field(default_factory=dict)  # of an archive: name of a link -> file that it links to
    streams = False
    archive = True

    def ref(self, name: str) -> Ref:
        raise NotImplementedError

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, bytes | Ref]]:
        """(name, content) of these files, in their order; in a compressed tar in the order of the archive, with a
        reference that raises OSError in place of content that is too large."""
        for name in names:
            yield name, self.ref(name).read()

    def contents(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """As `read`, but content that is too large raises OSError."""
        for name, data in self.read(names):
            yield name, data if isinstance(data, bytes) else data.read()

    def _add(self, name: str) -> bool:
        """Whether the file is not hidden."""
        if any(part.startswith(".") or part == "__MACOSX" for part in name.split("/")):
            self.hidden += 1
            return False
        self.names.append(name)
        return True

    def _add_member(self, name: str, member: Any = None, link: str | None = None) -> None:
        """`member`: where the file is in the archive; `link`: the target, if it is a link."""
        if name in self.members or name in self.links:
            raise RefusedArchive(f"{self.path} holds two members called {name!r}: unpack it and convert the folder")
        if not self._add(name):
            return
        if link is None:
            self.members[name] = member
        else:
            self.links[name] = posixpath.normpath(link)

    def _resolve_links(self) -> None:
        """Keep the links to a file of the archive, at their positions in `names`; the others count as hidden."""
        for name, target in self.links.items():
            for _ in range(MAX_LINKS):
                target = self.links.get(target, target)
            self.links[name] = target
        broken = {name for name, target in self.links.items() if target not in self.members}
        self.names = [name for name in self.names if name not in broken]
        self.links = {name: target for name, target in self.links.items() if name not in broken}
        self.hidden += len(broken)


def safe_name(archive: Path, name: str, target: str | None = None) -> str:
    """The normalised name of a member, or the target of a link.  RefusedArchive if it points outside the archive."""
    depth, parts = 0, []
    path = (name if target is None else target).replace("\\", "/")
    for part in path.split("/"):
        if part not in ("", "."):
            depth += -1 if part == ".." else 1
            parts.append(part)
        if depth < 0 or (part == ".." and target is None):
            depth = -1
            break
    if depth < 0 or path.startswith("/") or re.match(r"[A-Za-z]:", path):
        arrow = "" if target is None else f" -> {target}"
        raise RefusedArchive(f"{archive}: member {name + arrow!r} points outside the archive; nothing was converted")
    return "/".join(parts)
