"""`fastssl convert check` finds a sound file sound, and damage."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import read_image
from convert_tools import (
    Stock,
    convert,
    converted,
    mixed_fixture,  # noqa: F401
)

from fastssl import data_prep
from fastssl.data_prep import ffcv_format


def test_check_of_an_undamaged_file(mixed, tmp_path, capsys):
    out = tmp_path / "o.beton"
    assert convert("imagefolder", mixed, out) == 0
    assert data_prep.main(["check", str(out)]) == 0
    report = capsys.readouterr().out
    assert "no errors. 300 images (257 JPEG, 43 raw)" in report and "images/s" in report
    sheet = np.asarray(read_image(tmp_path / "o.png"))
    first = np.asarray(read_image(mixed / "c0" / "000.png")).mean((0, 1))
    cell = sheet[2:110, 2:110].reshape(-1, 3)
    assert sheet.shape == (8 * 128, 1120, 3)
    assert abs(cell[cell.min(1) < 250].mean(0) - first).max() < 8


def damage(out: Path, how: str, stock: Stock) -> None:
    """Change one thing, and the hash in the card, too, unless the hash must find the damage."""
    data, card = bytearray(out.read_bytes()), json.loads(out.with_suffix(".json").read_text())
    table = ffcv_format.HEADER.itemsize + 3 * ffcv_format.FIELD.itemsize
    width = stock.reader.metadata.dtype.itemsize
    if how == "bit":
        data[-40] ^= 1
    elif how == "short":
        del data[-24:]
    elif how == "jpeg":
        pointer = int(stock.table["image"]["data_ptr"][1])
        data[pointer : pointer + 40] = bytes(40)
    elif how == "index":
        data[table + width + 16] ^= 1
    elif how == "label":
        data[table + width + 24] = 77
    elif how == "height":
        data[table + 3] += 100
    elif how == "card":
        card["samples"] += 1
    if how in ("jpeg", "index", "label", "height"):
        card["sha256"] = __import__("hashlib").sha256(data).hexdigest()
    out.write_bytes(data)
    out.with_suffix(".json").write_text("{" if how == "json" else json.dumps(card))


@pytest.mark.parametrize(
    "how, message",
    [
        ("bit", "sha256"),
        ("short", "bytes"),
        ("jpeg", "do not decode, the first is row 1"),
        ("index", "index"),
        ("label", "labels from"),
        ("height", "max_height"),
        ("card", "samples"),
        ("json", "is not valid JSON"),
    ],
)
def test_check_finds_damage(mixed, tmp_path, capsys, how, message):
    out = tmp_path / "o.beton"
    damage(out, how, converted("imagefolder", mixed, out))
    assert data_prep.main(["check", str(out)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "o.png").exists()


def test_check_without_a_file_or_card(mixed, tmp_path, capsys):
    assert data_prep.main(["check", str(tmp_path / "o.beton")]) == 2
    assert convert("digits", "test", tmp_path / "o.beton") == 0
    (tmp_path / "o.json").unlink()
    assert data_prep.main(["check", str(tmp_path / "o.beton")]) == 2
    assert "data card" in capsys.readouterr().err
