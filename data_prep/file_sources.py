"""Folders, tar and zip archives as one thing: names of files, and how to get their bytes.

Nothing is ever extracted.  Where the bytes can be read at random (folder, plain tar, zip) `ref(name)` is a small
picklable reference that a worker process reads; a compressed tar is streamed in its own order (`streams` is True).
"""

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
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath

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
    OverflowError,
)
MAX_BYTES = 512 << 20  # of one encoded image; the largest photographs have some 100 MB
MAX_LINK = 4096  # bytes of a link's target
MAX_HEADER = 1 << 16  # bytes of a long name or a pax header in a tar, which tarfile reads whole


class RefusedArchive(ValueError):
    """An archive that is refused by a rule of this file; its message is complete."""


def bounded(size: int) -> int:
    """`size`, or OSError for more than an image may have: a few kilobytes of archive can declare 10 GiB of zeros."""
    if size > MAX_BYTES:
        raise OSError(f"it has {size / 2**20:.0f} MiB, at most {MAX_BYTES >> 20} MiB are read")
    return size


@dataclass(frozen=True)
class FileRef:
    path: str

    def read(self) -> bytes:
        handle = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe would wait for a writer
        with open(handle, "rb") as file:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                raise OSError("not a regular file")
            return file.read(bounded(found.st_size))


@dataclass(frozen=True)
class SliceRef:
    """`size` bytes at `offset` of a file: a member of an uncompressed tar."""

    path: str
    offset: int
    size: int

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            return os.pread(file.fileno(), bounded(self.size), self.offset)


@dataclass(frozen=True)
class ZipRef:
    path: str
    name: str

    def read(self) -> bytes:
        return read_zip(_zip(self.path, os.getpid()), self.name, MAX_BYTES)


@dataclass(frozen=True)
class TooLarge:
    """A member of a compressed tar that is not read; OSError says why, when it is asked for."""

    size: int

    def read(self) -> bytes:
        return bytes(bounded(self.size))


def read_zip(archive: zipfile.ZipFile, name: str, most: int) -> bytes:
    member = archive.getinfo(name)
    size = member.file_size
    if size > most:
        raise OSError(f"it has {size / 2**20:.3g} MiB, at most {most / 2**20:.3g} MiB are read")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # bzip2 and LZMA unpack without bound
        raise OSError(
            f"it is compressed by method {member.compress_type}, and only stored and deflated members are "
            "read: unpack the archive and convert the folder"
        )
    with archive.open(member) as file:  # of read() without a size the decompressor would give all that it has
        return file.read(size) + file.read(1)  # the second compares the checksum


@lru_cache(maxsize=2)
def _zip(path: str, pid: int) -> zipfile.ZipFile:
    """One handle per process (hence `pid`): a forked worker must not share the parent's file position."""
    return zipfile.ZipFile(path)


@dataclass
class FileSource:
    path: Path
    names: list[str] = field(default_factory=list)
    hidden: int = 0  # files such as .DS_Store and __MACOSX/..., and links that lead to no file of the archive
    links: dict[str, str] = field(default_factory=dict)  # name of a link in an archive -> the file that it leads to
    streams = False
    archive = True

    def ref(self, name: str):
        raise NotImplementedError

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        for name in names:
            yield name, self.ref(name).read()

    def _link(self, name: str, target: str) -> None:
        if self._add(name):
            self.links[name] = posixpath.normpath(target)

    def _resolve(self, files: dict) -> None:
        """Leave the links that lead to one of `files`, at their places in `names`, and count the others as hidden."""
        for name, target in self.links.items():
            for _ in range(40):  # as many as Linux follows
                target = self.links.get(target, target)
            self.links[name] = target
        lost = {name for name, target in self.links.items() if target not in files}
        self.names = [name for name in self.names if name not in lost]
        self.links = {name: target for name, target in self.links.items() if name not in lost}
        self.hidden += len(lost)

    def _add(self, name: str) -> bool:
        if any(part.startswith(".") or part == "__MACOSX" for part in name.split("/")):
            self.hidden += 1
            return False
        self.names.append(name)
        return True


class Folder(FileSource):
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
    """A header whose sizes are possible.  A tar that stops between two members reads like a complete one; only its end
    mark tells."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            member = super().fromtarfile(tar)
        except tarfile.EmptyHeaderError:
            raise tarfile.ReadError("it has no end mark, so it is cut off; copy or download it again") from None
        if member.size < 0 or tar.offset <= member.offset:  # it would be read again and again
            raise tarfile.ReadError(f"the size of {member.name!r} is negative")
        return member

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        whole = (
            tarfile.GNUTYPE_LONGNAME,
            tarfile.GNUTYPE_LONGLINK,
            tarfile.XHDTYPE,
            tarfile.XGLTYPE,
            tarfile.SOLARIS_XHDTYPE,
        )
        if self.size < 0 or (self.type in whole and self.size > MAX_HEADER):
            raise tarfile.ReadError(f"the header {self.name!r} has {self.size} bytes")
        return super()._proc_member(tar)


class Tar(FileSource):
    def __init__(self, path: Path):
        super().__init__(path)
        self.slices: dict[str, tuple[int, int]] = {}
        if path.stat().st_size == 0:
            raise ValueError(f"cannot read the archive {path}: it is empty")
        try:
            with tarfile.open(path, "r:", tarinfo=_Member):
                self.mode = "r:"
        except ARCHIVE_ERRORS:
            self.mode, self.streams = "r|*", True
        size = path.stat().st_size
        for name, member, _ in self._members(set()):
            if name in self.slices or name in self.links:
                raise ValueError(f"{path} holds two members called {name!r}: unpack it and convert the folder")
            if member.islnk() or member.issym():
                base = PurePosixPath(name).parent if member.issym() else PurePosixPath()
                self._link(name, str(base / member.linkname.replace("\\", "/")))
                continue
            if self.mode == "r:" and member.offset_data + member.size > size:
                raise ValueError(f"{path} is cut off inside {name!r}: copy or download it again")
            if self._add(name):
                self.slices[name] = (member.offset_data, member.size)
        self._resolve(self.slices)

    def _members(self, wanted: set[str]) -> Iterator[tuple[str, tarfile.TarInfo, bytes]]:
        """Every ordinary file and link: its name, its entry, and of a wanted file its bytes (or TooLarge)."""
        try:
            with tarfile.open(self.path, self.mode, tarinfo=_Member) as tar:
                for member in tar:
                    tar.members = []  # TarFile remembers every member: 1 GB of memory for ImageNet
                    name = inside(self.path, member.name)
                    if member.islnk() or member.issym():
                        base = PurePosixPath(member.name).parent if member.issym() else PurePosixPath()
                        inside(self.path, member.name, target=str(base / member.linkname))
                        yield name, member, b""
                    elif member.isreg() and not member.issparse():
                        yield name, member, self._bytes(tar, member) if name in wanted else b""
                    elif not member.isdir():
                        raise RefusedArchive(f"{self.path}: member {name!r} is not an ordinary file")
        except RefusedArchive:
            raise
        except ARCHIVE_ERRORS as error:
            raise ValueError(f"cannot read the archive {self.path}: {error or type(error).__name__}") from error

    @staticmethod
    def _bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | TooLarge:
        if member.size > MAX_BYTES:
            return TooLarge(member.size)
        data = tar.extractfile(member).read()
        if len(data) != member.size:
            raise tarfile.ReadError(f"it is cut off inside {member.name!r}")
        return data

    def ref(self, name: str) -> SliceRef:
        return SliceRef(str(self.path), *self.slices[self.links.get(name, name)])

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        if not self.streams:
            yield from super().read(names)
            return
        wanted = set(names)
        linked: dict[str, list[str]] = {}  # file -> the wanted links to it, which come with it
        for name, target in self.links.items():
            if name in wanted:
                linked.setdefault(target, []).append(name)
        for name, member, data in self._members(wanted | linked.keys()):
            if name in wanted and not (member.islnk() or member.issym()):
                yield name, data
            for link in linked.get(name, ()):
                yield link, data


class Zip(FileSource):
    def __init__(self, path: Path):
        super().__init__(path)
        try:
            self._list(path, _zip(str(path), os.getpid()))
        except RefusedArchive:
            raise
        except ARCHIVE_ERRORS as error:
            raise ValueError(f"cannot read the archive {path}: {error or type(error).__name__}") from error
        self._resolve(self.members)

    def _list(self, path: Path, archive: zipfile.ZipFile) -> None:
        self.members: dict[str, str] = {}
        for member in archive.infolist():
            name = inside(path, member.filename)
            if member.flag_bits & 1:
                raise RefusedArchive(f"{path} is encrypted ({name!r}): unpack it and convert the folder")
            if stat.S_ISLNK(member.external_attr >> 16):
                target = read_zip(archive, member.filename, MAX_LINK).decode("utf-8", "replace")
                target = str(PurePosixPath(member.filename).parent / target)
                inside(path, member.filename, target=target)
                self._link(name, target)
            elif not member.is_dir():
                if name in self.members or name in self.links:
                    raise RefusedArchive(f"{path} holds two members called {name!r}: unpack it and convert the folder")
                if self._add(name):
                    self.members[name] = member.filename

    def ref(self, name: str) -> ZipRef:
        return ZipRef(str(self.path), self.members[self.links.get(name, name)])


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
        raise RefusedArchive(f"{archive}: member {name + arrow!r} points outside the archive; nothing was converted")
    return "/".join(clean)


def open_files(path: Path) -> FileSource:
    """The folder, tar or zip at `path`, by its content."""
    if path.is_dir():
        return Folder(path)
    if not path.is_file():
        raise ValueError(
            f"there is no file or folder {path}" if not path.exists() else f"{path} is neither a file nor a folder"
        )
    return Zip(path) if zipfile.is_zipfile(path) else Tar(path)
