"""Archives that were made to do harm: they end in one line, in little memory, and start no other program."""

import io
import pickle
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
from convert_tools import convert, converted, photo, save

from fastssl.data_prep.plainpickle import read_pickle

LIMIT = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)
from fastssl import data_prep
sys.exit(data_prep.main([*sys.argv[2:], "--workers", "1"]))
"""


def refused(*argv, memory=2 << 30, seconds=60) -> str:
    """The error of a conversion in a process of its own with limited memory, so that a crash is detected."""
    done = subprocess.run(
        [sys.executable, "-c", LIMIT, str(memory), *map(str, argv)],
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, (done.returncode, done.stderr[-2000:])
    return done.stderr


def batch(labels) -> bytes:
    return pickle.dumps({b"labels": labels, b"data": np.zeros((2, 3072), np.uint8)}, 2)


@pytest.mark.parametrize(
    "content, message",
    [
        (
            b"\x80\x02}" + b"K\x01" + b"\x85" * 200_000 + b"K\x01s.",
            "key",
        ),  # a tuple in a tuple ...: its hash recurses in C
        (b"\x80\x02(" + b"K\x01" + b"\x85" * 200_000 + b"K\x01d.", "key"),
        (b"\x80\x04\x8f(K\x01\x90.", "EMPTY_SET"),
        (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.", "refused"),
        (b"(" * 1000, "refused"),
        (b"\x80\x02N.", "NoneType"),
        (b"\x80\x02cos\nsystem\n(U\x02lst R.", "refused"),
        (b"\x80\x02(U\x02lsios\nsystem\n.", "INST"),
        (b"\x80\x02]e.", "refused"),
        (b"\x80\x02K\x01a.", "refused"),
        (b".", "refused"),
        (b"", "refused"),
        (batch([0, 0.5]), "BINFLOAT"),
        (batch([0, np.int64(1)]), "numpy._core.multiarray.scalar"),
        (batch(np.zeros(2, np.float32)), "only arrays of whole numbers"),
        (batch(np.array([{}, None])), "only arrays of whole numbers"),
        (batch(np.zeros(2, ">i8")), "byte order"),
        (b"\x80\x02}r\xff\xff\xff\x7f" + b"N" * 9, "refused"),
    ],
)
def test_pickles_with_other_content_than_cifar_are_refused(content, message):
    with pytest.raises(ValueError, match=f"^x is refused as a CIFAR pickle: .*{message}|^x is {message}"):
        read_pickle(content, "x")


CIFAR = ("batches.meta", "data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5")


@pytest.mark.parametrize(
    "change, content, message",
    [
        (0, b"\x80\x02}r\xff\xff\xff\xff.", "'label_names'"),  # Python's unpickler allocates 64 GiB for this index
        (0, pickle.dumps({b"label_names": [1, 2]}, 2), "'label_names'"),
        (1, batch([0, 2]), "numbers from 0 to 1"),
        (5, batch([0]), "of 2 numbers"),
        (5, batch(5), "of 2 numbers"),
        (3, pickle.dumps({b"labels": [0]}, 2), "'data'"),
        (2, pickle.dumps({b"labels": [0], b"data": np.zeros((1, 3071), np.uint8)}, 2), "(N, 3072)"),
    ],
)
def test_cifar_batches_with_wrong_content_are_refused(tmp_path, change, content, message, capsys):
    (tmp_path / "in").mkdir()
    for i, name in enumerate(CIFAR):
        good = batch([0, 1]) if i else pickle.dumps({b"label_names": [b"a", b"b"]}, 2)
        (tmp_path / "in" / name).write_bytes(content if i == change else good)
    assert convert("cifar10", tmp_path / "in", tmp_path / "o.beton") == 2
    error = capsys.readouterr().err
    assert CIFAR[change] in error and message in error and error.count("\n") == 1


@pytest.mark.parametrize("labels", [[0, 1], np.array([0, 1]), np.array([0, 1], np.uint8)])
@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
def test_pickles_of_every_protocol_are_read(labels, protocol):
    data = np.arange(6144, dtype=np.int64).astype(np.uint8).reshape(2, 3072)
    value = read_pickle(pickle.dumps({b"labels": labels, b"data": data, "names": ["a", "b"]}, protocol), "x")
    assert list(value[b"labels"]) == [0, 1] and value["names"] == ["a", "b"] and (value[b"data"] == data).all()


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_a_long_tar_header_is_refused(tmp_path, kind):
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = kind, 1 << 30
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz", compresslevel=1) as tar:
        tar.fileobj.write(info.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 20))
    assert "has 1073741824 bytes" in refused("tar", tmp_path / "a.tar.gz", tmp_path / "o.beton")


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("size", [-512, -1024])
def test_a_negative_size_in_a_tar_is_refused(tmp_path, mode, size):
    info = tarfile.TarInfo("a.jpg")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" + (size).to_bytes(11, "big", signed=True)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    with tarfile.open(tmp_path / "a.tar", mode) as tar:
        tar.fileobj.write(bytes(header) + bytes(10240))
    refused("tar", tmp_path / "a.tar", tmp_path / "o.beton")


def test_a_pax_header_with_a_negative_size(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.jpg")
        info.size, info.pax_headers = 10, {"size": "-1024"}
        tar.addfile(info, io.BytesIO(bytes(10)))
    refused("tar", tmp_path / "a.tar", tmp_path / "o.beton")


def test_a_zip_member_that_unpacks_to_more_than_it_declares(tmp_path):
    """zipfile decompresses everything and cuts it off afterwards."""
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z, z.open("a.jpg", "w", force_zip64=True) as member:
        for _ in range(1 << 9):
            member.write(bytes(2 << 20))
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02")
    data[at + 24 : at + 28] = (1000).to_bytes(4, "little")
    path.write_bytes(data)
    assert "a.jpg" in refused("zip", path, tmp_path / "o.beton", memory=800 << 20)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zip_methods_that_ignore_a_limit_are_refused(tmp_path, method, capsys):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as z:
        z.write(save(tmp_path / "a.jpg"), "a.jpg")
    assert convert("zip", tmp_path / "a.zip", tmp_path / "o.beton") == 2
    assert f"compressed by method {method}" in capsys.readouterr().err


def test_other_formats_are_not_opened(tmp_path, capsys):
    """Pillow recognises formats by content, and reads EPS with Ghostscript."""
    (tmp_path / "in").mkdir()
    save(tmp_path / "x.eps")
    (tmp_path / "x.eps").rename(tmp_path / "in" / "a.jpg")
    assert convert("imagefolder", tmp_path / "in", tmp_path / "o.beton") == 2
    assert "a.jpg (not an image in a known format)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["jpg", "png", "bmp", "webp", "tif", "gif", "ppm", "pgm", "jp2", "avif"])
def test_every_known_format_is_opened(tmp_path, name):
    save(tmp_path / "in" / f"a.{name}", photo()[:, :, 0] if name == "pgm" else photo())
    assert converted("imagefolder", tmp_path / "in", tmp_path / "o.beton").pixels(0).shape == (48, 64, 3)


def test_an_image_is_not_enlarged_beyond_what_ffcv_stores(tmp_path):
    save(tmp_path / "in" / "a.jpg", photo(1, 8, 8))
    line = refused("imagefolder", tmp_path / "in", tmp_path / "o.beton", "--short-side", 65535, "--upscale")
    assert "65535x65535 pixels" in line
