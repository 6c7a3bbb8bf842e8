"""A tar archive.  Uncompressed, its members are slices of the file; compressed, it is read from front to back."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from . import base
from .base import ARCHIVE_ERRORS, FileSource, Ref, RefusedArchive, archive_errors, check_size, safe_name

MAX_HEADER = 1 << 16  # bytes of a long name or a pax header, which tarfile reads at once
LONG_HEADERS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


@dataclass(frozen=True)
class SliceRef:
    """`size` bytes at `offset` of a file: a member of an uncompressed tar."""

    path: str
    offset: int
    size: int

    def read(self) -> bytes:
        check_size(self.size)
        with open(self.path, "rb") as file:
            return os.pread(file.fileno(), self.size, self.offset)


class _Member(tarfile.TarInfo):
    """A header with checked sizes.  A tar that ends between two members is read like a complete one; only the end mark
    shows the difference.  (mypy does not know the parts of tarfile that it does not document.)"""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _Member:
        try:
            member = super().fromtarfile(tar)
        except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
            raise tarfile.ReadError("it has no end mark, so it is cut off; copy or download it again") from None
        if member.size < 0 or tar.offset <= member.offset:  # tarfile would read it again and again
            raise tarfile.ReadError(f"the size of {member.name!r} is negative")
        return member

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.size < 0 or (self.type in LONG_HEADERS and self.size > MAX_HEADER):
            raise tarfile.ReadError(f"the header {self.name!r} has {self.size} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]


class Tar(FileSource):
    def __init__(self, path: Path):
        super().__init__(path)
        self.mode: Literal["r:", "r|*"] = "r:"
        size = path.stat().st_size
        if size == 0:
            raise ValueError(f"cannot read the archive {path}: it is empty")
        try:
            tarfile.open(path, self.mode, tarinfo=_Member).close()
        except ARCHIVE_ERRORS:
            self.mode, self.streams = "r|*", True
        for name, member, _ in self._members(set()):
            if member.islnk() or member.issym():
                folder = PurePosixPath(name).parent if member.issym() else PurePosixPath()
                self._add_member(name, link=str(folder / member.linkname.replace("\\", "/")))
                continue
            if self.mode == "r:" and member.offset_data + member.size > size:
                raise ValueError(f"{path} is cut off inside {name!r}: copy or download it again")
            self._add_member(name, (member.offset_data, member.size))
        self._resolve_links()

    def _members(self, wanted: set[str]) -> Iterator[tuple[str, tarfile.TarInfo, bytes | SliceRef]]:
        """The name and header of each file and link, and the content of a wanted file (b"" otherwise)."""
        with archive_errors(self.path), tarfile.open(self.path, self.mode, tarinfo=_Member) as tar:
            for member in tar:
                # TarFile keeps a list of all members, for ImageNet 1 GB of memory
                tar.members = []  # type: ignore[attr-defined]
                name = safe_name(self.path, member.name)
                if member.islnk() or member.issym():
                    folder = PurePosixPath(member.name).parent if member.issym() else PurePosixPath()
                    safe_name(self.path, member.name, target=str(folder / member.linkname))
                    yield name, member, b""
                elif member.isreg() and not member.issparse():
                    yield name, member, self._content(tar, member) if name in wanted else b""
                elif not member.isdir():
                    raise RefusedArchive(f"{self.path}: member {name!r} is not an ordinary file")

    def _content(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | SliceRef:
        if member.size > base.MAX_BYTES:
            return SliceRef(str(self.path), member.offset_data, member.size)  # whose `read` raises OSError
        file = tar.extractfile(member)
        assert file is not None, "an ordinary file has content"
        data = file.read()
        if len(data) != member.size:
            raise tarfile.ReadError(f"it is cut off inside {member.name!r}")
        return data

    def ref(self, name: str) -> SliceRef:
        return SliceRef(str(self.path), *self.members[self.links.get(name, name)])

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, bytes | Ref]]:
        if not self.streams:
            yield from super().read(names)
            return
        wanted = set(names)
        links: dict[str, list[str]] = {}  # file -> the wanted links to it, which are returned right after it
        for name, target in self.links.items():
            if name in wanted:
                links.setdefault(target, []).append(name)
        for name, member, data in self._members(wanted | links.keys()):
            if name in wanted and not (member.islnk() or member.issym()):
                yield name, data
            for link in links.get(name, ()):
                yield link, data
