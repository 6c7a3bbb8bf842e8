"""A zip archive, whose members can be read in any order."""

from __future__ import annotations

import os
import stat
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

from .base import FileSource, RefusedArchive, archive_errors, check_size, safe_name

MAX_LINK = 4096  # bytes of a link's target


@dataclass(frozen=True)
class ZipRef:
    path: str
    name: str

    def read(self) -> bytes:
        archive = _open(self.path, os.getpid())
        check_size(archive.getinfo(self.name).file_size)
        return _read(archive, self.name)


def _read(archive: zipfile.ZipFile, name: str) -> bytes:
    """At most as many bytes as the archive declares for the member, which the caller has checked."""
    member = archive.getinfo(name)
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # bzip2 and LZMA ignore a limit
        raise OSError(
            f"it is compressed by method {member.compress_type}, and only stored and deflated members are "
            "read: unpack the archive and convert the folder"
        )
    with archive.open(member) as file:  # read() without a size would decompress everything
        return file.read(member.file_size) + file.read(1)  # the second read compares the checksum


@lru_cache(maxsize=2)
def _open(path: str, pid: int) -> zipfile.ZipFile:
    """One handle per process (hence `pid`): a forked worker must not share the parent's file position."""
    return zipfile.ZipFile(path)


class Zip(FileSource):
    def __init__(self, path: Path):
        super().__init__(path)
        with archive_errors(path):
            self._list(_open(str(path), os.getpid()))
        self._resolve_links()

    def _list(self, archive: zipfile.ZipFile) -> None:
        for member in archive.infolist():
            name = safe_name(self.path, member.filename)
            if member.flag_bits & 1:
                raise RefusedArchive(f"{self.path} is encrypted ({name!r}): unpack it and convert the folder")
            if stat.S_ISLNK(member.external_attr >> 16):
                if member.file_size > MAX_LINK:
                    raise RefusedArchive(f"{self.path}: the target of the link {name!r} has {member.file_size} bytes")
                target = _read(archive, member.filename).decode("utf-8", "replace")
                target = str(PurePosixPath(member.filename).parent / target)
                safe_name(self.path, member.filename, target=target)
                self._add_member(name, link=target)
            elif not member.is_dir():
                self._add_member(name, member.filename)

    def ref(self, name: str) -> ZipRef:
        return ZipRef(str(self.path), self.members[self.links.get(name, name)])
