"""Folders, tar and zip archives as one thing: names of files, and how to get their bytes.

Nothing is ever extracted.  Where the bytes can be read at random (folder, plain tar, zip) `ref(name)` is a small
picklable reference that a worker process reads; a compressed tar is streamed in its own order (`streams` is True).
"""

from __future__ import annotations

import lzma
import os
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath

ARCHIVE_ERRORS = (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, OSError)


@dataclass(frozen=True)
class FileRef:
    path: str

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            return file.read()


@dataclass(frozen=True)
class SliceRef:
    """`size` bytes at `offset` of a file: a member of an uncompressed tar."""

    path: str
    offset: int
    size: int

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            return os.pread(file.fileno(), self.size, self.offset)


@dataclass(frozen=True)
class ZipRef:
    path: str
    name: str

    def read(self) -> bytes:
        return _zip(self.path, os.getpid()).read(self.name)


@lru_cache(maxsize=2)
def _zip(path: str, pid: int) -> zipfile.ZipFile:
    """One handle per process (hence `pid`): a forked worker must not share the parent's file position."""
    return zipfile.ZipFile(path)


@dataclass
class Tree:
    path: Path
    names: list[str] = field(default_factory=list)
    hidden: int = 0  # files such as .DS_Store and __MACOSX/..., and links inside an archive
    streams = False
    archive = True

    def ref(self, name: str):
        raise NotImplementedError

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        for name in names:
            yield name, self.ref(name).read()

    def _add(self, name: str) -> bool:
        if any(part.startswith(".") or part == "__MACOSX" for part in name.split("/")):
            self.hidden += 1
            return False
        self.names.append(name)
        return True


class Folder(Tree):
    archive = False

    def __init__(self, path: Path):
        super().__init__(path)
        seen = set()  # real folders on the way, so that a link to a parent does not loop for ever
        for top, folders, files in os.walk(path, followlinks=True, onerror=_raise):
            real = os.path.realpath(top)
            if real in seen:
                raise ValueError(f"{top} leads to a folder that was read already ({real}): remove the link")
            seen.add(real)
            folders[:] = sorted(f for f in folders if not f.startswith("."))
            base = Path(top).relative_to(path).as_posix()
            for name in files:
                self._add(name if base == "." else f"{base}/{name}")
        self.names.sort(key=lambda name: name.split("/"))

    def ref(self, name: str) -> FileRef:
        return FileRef(str(self.path / name))


class _Member(tarfile.TarInfo):
    """A tar that stops between two members reads like a complete one; only its end mark tells."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tar)
        except tarfile.EmptyHeaderError:
            raise tarfile.ReadError("it has no end mark, so it is cut off; copy or download it again") from None


class Tar(Tree):
    def __init__(self, path: Path):
        super().__init__(path)
        self.slices: dict[str, tuple[int, int]] = {}
        try:
            with tarfile.open(path, "r:"):
                self.mode = "r:"
        except tarfile.ReadError:
            self.mode, self.streams = "r|*", True
        size = path.stat().st_size
        for name, member, _ in self._members(set()):
            if self.mode == "r:" and member.offset_data + member.size > size:
                raise ValueError(f"{path} is cut off inside {name!r}: copy or download it again")
            if name in self.slices:
                raise ValueError(f"{path} holds two members called {name!r}: unpack it and convert the folder")
            if self._add(name):
                self.slices[name] = (member.offset_data, member.size)

    def _members(self, wanted: set[str]) -> Iterator[tuple[str, tarfile.TarInfo, bytes]]:
        """Every ordinary file: its name, its entry, and its bytes if it is wanted."""
        try:
            with tarfile.open(self.path, self.mode, tarinfo=_Member) as tar:
                for member in tar:
                    tar.members = []  # TarFile remembers every member: 1 GB of memory for ImageNet
                    name = inside(self.path, member.name)
                    if member.islnk() or member.issym():
                        base = PurePosixPath(member.name).parent if member.issym() else PurePosixPath()
                        inside(self.path, member.name, target=str(base / member.linkname))
                        self.hidden += 1
                    elif member.isreg() and not member.issparse():
                        yield name, member, tar.extractfile(member).read() if name in wanted else b""
                    elif not member.isdir():
                        raise ValueError(f"{self.path}: member {name!r} is no ordinary file")
        except ARCHIVE_ERRORS as error:
            raise ValueError(f"cannot read the archive {self.path}: {error}") from error

    def ref(self, name: str) -> SliceRef:
        return SliceRef(str(self.path), *self.slices[name])

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        if not self.streams:
            yield from super().read(names)
            return
        wanted = set(names)
        for name, _, data in self._members(wanted):
            if name in wanted:
                yield name, data


class Zip(Tree):
    def __init__(self, path: Path):
        super().__init__(path)
        try:
            members = _zip(str(path), os.getpid()).infolist()
        except ARCHIVE_ERRORS as error:
            raise ValueError(f"cannot read the archive {path}: {error}") from error
        self.members = {}
        for member in members:
            name = inside(path, member.filename)
            if stat.S_ISLNK(member.external_attr >> 16):
                target = _zip(str(path), os.getpid()).read(member).decode("utf-8", "replace")
                inside(path, member.filename, target=str(PurePosixPath(member.filename).parent / target))
                self.hidden += 1
            elif not member.is_dir():
                if member.flag_bits & 1:
                    raise ValueError(f"{path} is encrypted ({name!r}): unpack it and convert the folder")
                if name in self.members:
                    raise ValueError(f"{path} holds two members called {name!r}: unpack it and convert the folder")
                if self._add(name):
                    self.members[name] = member.filename

    def ref(self, name: str) -> ZipRef:
        return ZipRef(str(self.path), self.members[name])


def _raise(error: OSError):
    raise error


def inside(archive: Path, name: str, target: str | None = None) -> str:
    """The normalised name of an archive member; ValueError if it, or the link it is, points outside the archive."""
    depth, clean = 0, []
    where = (target if target is not None else name).replace("\\", "/")
    for part in where.split("/"):
        if part not in ("", "."):
            depth += -1 if part == ".." else 1
            clean.append(part)
        if depth < 0 or (part == ".." and target is None):
            depth = -1
            break
    if depth < 0 or where.startswith("/") or re.match(r"[A-Za-z]:", where):
        arrow = f" -> {target}" if target is not None else ""
        raise ValueError(f"{archive}: member {name + arrow!r} points outside the archive; nothing was converted")
    return "/".join(clean)


def open_tree(path: Path) -> Tree:
    """The folder, tar or zip at `path`, by its content."""
    if path.is_dir():
        return Folder(path)
    if not path.is_file():
        raise ValueError(f"there is no file or folder {path}")
    return Zip(path) if zipfile.is_zipfile(path) else Tar(path)
