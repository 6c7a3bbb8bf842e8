"""Folders, tar and zip archives as `FileSource`: the names of their files, and how to get the bytes.

Archives are not extracted.  Where any file can be read directly (folder, uncompressed tar, zip), `ref(name)` is a
small picklable reference that a worker process reads; a compressed tar is read from front to back (`streams`).
"""

from __future__ import annotations

import zipfile
from pathlib import Path

from .base import ARCHIVE_ERRORS, FileRef, FileSource, archive_errors
from .folder import Folder
from .tar import Tar
from .zip import Zip

__all__ = ["ARCHIVE_ERRORS", "FileRef", "FileSource", "open_files"]


def open_files(path: Path) -> FileSource:
    """The folder, tar or zip at `path`; archives are recognised by their content."""
    if path.is_dir():
        return Folder(path)
    if not path.is_file():
        raise ValueError(
            f"there is no file or folder {path}" if not path.exists() else f"{path} is neither a file nor a folder"
        )
    with archive_errors(path):
        zipped = zipfile.is_zipfile(path)
    return Zip(path) if zipped else Tar(path)
