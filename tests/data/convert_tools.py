"""What the conversion tests share: running the command, and reading its file with stock FFCV's own Reader."""

import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastssl import data_prep

DATA = Path(os.environ.get("FASTSSL_DATA") or Path(__file__).parents[2] / ".." / "shared" / "data")


def shared(name: str) -> Path:
    """A file of the shared data folder; skips the test if it is missing."""
    if not (DATA / name).exists():
        pytest.skip(f"{name} is not in {DATA} (set FASTSSL_DATA)")
    return DATA / name


def convert(*argv, workers=1) -> int:
    return data_prep.main([*map(str, argv), "--workers", str(workers)])


class Stock:
    """The tables and the stored bytes of a file as stock FFCV reads them, and its data card."""

    def __init__(self, path):
        from ffcv.memory_managers import OSCacheManager
        from ffcv.reader import Reader

        self.reader = Reader(str(path))
        self.sizes = OSCacheManager(self.reader).ptr_to_size
        self.table = {name: self.reader.metadata[f"f{i}"] for i, name in enumerate(self.reader.field_names)}
        self.data = np.memmap(path, np.uint8, "r")
        self.card = json.loads(Path(path).with_suffix(".json").read_text())

    def payload(self, row) -> bytes:
        pointer = self.table["image"]["data_ptr"][row]
        return bytes(self.data[pointer : pointer + self.sizes[pointer]])

    def pixels(self, row) -> np.ndarray:
        image = self.table["image"][row]
        if image["mode"] == 1:
            return np.frombuffer(self.payload(row), np.uint8).reshape(image["height"], image["width"], 3)
        return np.asarray(Image.open(io.BytesIO(self.payload(row))).convert("RGB"))

    def vector(self, row) -> np.ndarray:
        pointer = self.table["label"][row]
        return self.data[pointer : pointer + self.sizes[pointer]].view("<f4")


def converted(kind, source, out, *options, workers=1) -> Stock:
    assert convert(kind, source, out, *options, workers=workers) == 0
    return Stock(out)


def photo(seed=0, height=48, width=64) -> np.ndarray:
    """A smooth colour image whose corners differ, so that a rotation or an exchange of channels is detected."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    red, green, blue = 255 * x, 255 * y, 255 * (0.5 + 0.5 * np.sin(seed + 3 * x + 2 * y))
    return np.stack([red, green, blue], -1).astype(np.uint8)


def save(path, pixels=None, **options) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(photo() if pixels is None else pixels)
    image.save(path, **options)
    return path


def folder(root, count=6, classes=("cat", "dog")) -> Path:
    """`count` JPEGs of different sizes in each class folder."""
    for c, name in enumerate(classes):
        for i in range(count):
            save(Path(root) / name / f"{i}.jpg", photo(10 * c + i, 40 + 3 * (i % 11), 60 - 2 * (i % 13)), quality=90)
    return Path(root)


def refused(capsys, *argv) -> str:
    """The single line on stderr of a conversion that fails and leaves no file."""
    out = argv[2]
    before = {p for p in out.parent.parent.rglob("*") if not p.name.endswith(".bad.txt")}
    assert convert(*argv) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and line.startswith("fastssl convert: ")
    assert {p for p in out.parent.parent.rglob("*") if not p.name.endswith(".bad.txt")} == before
    return line


def archive(path, members: dict, compression=zipfile.ZIP_STORED) -> None:
    """A zip, or a tar that is compressed as its suffix says."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", compression) as z:
            for name, data in members.items():
                z.writestr(name, data)
        return
    with tarfile.open(path, "w:" + path.suffix[1:].replace("tar", "")) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def files(root) -> dict:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*.jpg"))}


@pytest.fixture(scope="module", name="mixed")
def mixed_fixture(tmp_path_factory):
    """A folder of JPEGs, PNGs, one rotated photograph: 300 images, several chunks of work."""
    root = tmp_path_factory.mktemp("mixed")
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(300):
        pixels = photo(i, 20 + i % 17, 20 + i % 23)
        options = {"exif": exif} if i == 30 else {}
        save(root / f"c{i % 3}" / (f"{i:03d}.png" if i % 7 == 0 else f"{i:03d}.jpg"), pixels, **options)
    return root
