"""Damaged files: their readers return a value or raise a ValueError of one line, and run no code from them."""

import io
import json
import pickle
import random
import struct
import tarfile
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from bare_trainer import bare_trainer
from conftest import jpeg, photo
from mutations import both, damaged, fuzz, odd, odd_json

from fastssl import log, weights
from fastssl.checkpoint import disk, run_folder
from fastssl.config import Backbone
from fastssl.data_prep import check
from fastssl.data_prep.file_sources import open_files
from fastssl.data_prep.image import Options, store_many
from fastssl.data_prep.lists import open_list
from fastssl.data_prep.plainpickle import read_pickle
from fastssl.data_prep.sources import open_images
from fastssl.weights import source


@pytest.fixture
def small(tmp_path):
    """A converted file of four images, with its card."""
    from fastssl.data_prep import main

    for i in range(4):
        path = tmp_path / "in" / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(photo(np.random.default_rng(i), 12, 16)))
    assert main(["imagefolder", str(tmp_path / "in"), str(tmp_path / "s.beton"), "--workers", "1"]) == 0
    return tmp_path / "s.beton"


@both
def test_damaged_data_cards(small, cases):
    card = json.loads(small.with_suffix(".json").read_text())

    def make(rng, _):
        small.with_suffix(".json").write_bytes(odd_json(card, rng))

    fuzz(
        make,
        lambda _: [check.BetonInspector(small).caption(0), check._check_labels(check.BetonInspector(small))],
        cases,
        small.parent,
    )


@both
def test_damaged_beton_headers_in_check(small, tmp_path, cases):
    whole, card = small.read_bytes(), json.loads(small.with_suffix(".json").read_text())

    def make(rng, _):
        data = damaged(whole, rng, head=rng.choice([24, 3300]))
        small.write_bytes(data)
        small.with_suffix(".json").write_text(json.dumps(card | {"bytes": len(data)}))

    def read(_):
        beton = check.BetonInspector(small)
        check._check_labels(beton)
        if (beton.images["height"].astype(int) * beton.images["width"] < 10**6).all():
            [beton.image(row) for row in range(beton.samples)]

    fuzz(make, read, cases, tmp_path)


@both
def test_damaged_beton_headers_in_the_loader(small, tmp_path, cases):
    from fastssl.decode import BetonReader

    whole = small.read_bytes()
    end = len(whole) - 4 * 24  # the table of allocations at the end is damaged, too

    def make(rng, case):
        file = tmp_path / f"{case % 2}.beton"
        file.unlink(missing_ok=True)  # a new file, because the old one may still be mapped
        data = damaged(whole[:end] + damaged(whole[end:], rng, head=96), rng, head=rng.choice([24, 3300]))
        file.write_bytes(data if rng.random() < 0.9 else data[: rng.randrange(len(data))])
        return file

    def read(file):
        beton = BetonReader(file)
        beton.labels(np.arange(beton.samples))
        if beton.max_pixels < 10**6:
            pixels, sizes = np.zeros((1, beton.max_pixels, 3), np.uint8), np.zeros((1, 2), np.int32)
            for row in range(beton.samples):
                beton.decode(np.array([row]), pixels, sizes)

    fuzz(make, read, cases, tmp_path)


@both
def test_damaged_manifests(tmp_path, cases):
    folder = disk.create(tmp_path, 1)
    (folder / "state.pt").write_bytes(b"x" * 10)
    path = disk.commit(folder, 2)
    good = json.loads((path / disk.MANIFEST).read_text())
    found = []

    def make(rng, _):
        (path / disk.MANIFEST).write_bytes(odd_json(good, rng))

    fuzz(make, lambda _: found.append(disk.damage(path)) or (_ for _ in ()).throw(ValueError), cases, tmp_path)
    assert sum(isinstance(text, str) for text in found) > cases // 2
    (disk.directory(tmp_path) / "step_x").mkdir()
    (disk.directory(tmp_path) / "step_00000009").write_text("a file")
    assert disk.list_checkpoints(tmp_path)[0].name == "step_00000009"
    assert "missing or unreadable" in disk.damage(disk.list_checkpoints(tmp_path)[0])


@both
def test_damaged_logs(tmp_path, cases):
    records = [{"step": i, "epoch": 0, "loss": 1.0 / (i + 1)} for i in range(6)]

    def make(rng, _):
        lines = [json.dumps(r).encode() for r in records]
        lines[rng.randrange(6)] = rng.choice([b"", b"\xff", odd_json(records[0], rng).replace(b"\n", b"")])
        (tmp_path / "log.jsonl").write_bytes(b"\n".join(lines) + b"\n")

    fuzz(make, lambda _: [record["step"] <= 3 for record in log.read(tmp_path)], cases, tmp_path, refused_at_least=0)
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n\n{"step": 2}\n{"st')
    assert [record["step"] for record in log.read(tmp_path)] == [1, 2]


@both
def test_damaged_environments(tmp_path, monkeypatch, cases):
    monkeypatch.setattr(run_folder.metadata, "version", lambda name: "1")  # 60 ms for each entry
    trainer = bare_trainer(folder=tmp_path, step=5)
    rng = random.Random(0)
    for case in range(cases):
        (tmp_path / "environment.json").write_bytes(b"null" if case == 0 else odd_json([{"step": 0, "ranks": 1}], rng))
        run_folder.record_environment(trainer)
        assert json.loads((tmp_path / "environment.json").read_text())[-1]["step"] == 5


@both
def test_damaged_safetensors_headers(tmp_path, cases):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(
        {"conv1.weight": torch.ones(2, 3), "b": torch.zeros(4)}, path, weights.metadata(Backbone("resnet18"))
    )
    whole = path.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header, body = json.loads(whole[8 : 8 + length]), whole[8 + length :]

    def make(rng, _):
        if rng.random() < 0.3:
            path.write_bytes(damaged(whole, rng))
            return
        new = header
        if rng.random() < 0.5:
            meta = json.loads(header["__metadata__"][source.SPEC_KEY])
            new = header | {"__metadata__": {source.SPEC_KEY: odd_json(meta, rng).decode("latin1")}}
        else:
            new = odd(header, rng)
        text = json.dumps(new).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + body)

    fuzz(make, lambda _: [weights.spec_of(path), weights.read(path)], cases, tmp_path)


ODD_TENSORS = [
    lambda: torch.ones(2, 3).to_sparse(),
    lambda: torch.ones(2, 2).to_sparse_csr(),
    lambda: torch.empty(3, device="meta"),
    lambda: torch.zeros(1).expand(1 << 40),
    lambda: None,
    lambda: 1 << 70,
    lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    lambda: [torch.ones(1)],
    lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    lambda: {"deep": {"er": torch.ones(2)}},
]


@both
def test_damaged_pth_files(tmp_path, cases):
    path = tmp_path / "a.pth"
    good = {"state_dict": {"conv1.weight": torch.ones(2, 3), "fc.bias": torch.zeros(4)}, "epoch": 3}
    torch.save(good, path)
    with zipfile.ZipFile(path) as z:
        members = {name: z.read(name) for name in z.namelist()}
    torch.save(good, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    old = (tmp_path / "old.pth").read_bytes()
    loop: dict = {"a": torch.ones(1)}
    loop["loop"] = loop
    many: dict = {"a": torch.ones(1)}
    for _ in range(60):
        many = {"x": many, "y": many}  # 2**60 paths

    def make(rng, case):
        if rng.random() < 0.04:
            torch.save(rng.choice([loop, many]), path)
        elif rng.random() < 0.2:
            torch.save({"state_dict": {"w": rng.choice(ODD_TENSORS)(), "v": torch.ones(1)}}, path)
        elif rng.random() < 0.4:
            path.write_bytes(damaged(old, rng))
        else:
            with zipfile.ZipFile(path, "w") as z:
                for name, data in members.items():
                    z.writestr(name, damaged(data, rng) if name.endswith("data.pkl") or rng.random() < 0.1 else data)

    fuzz(make, lambda _: weights.read(path), cases, tmp_path)


def archives(rng: random.Random) -> tuple[str, bytes]:
    kind, out = rng.choice(["zip", "tar", "tgz"]), io.BytesIO()
    image = jpeg(photo(np.random.default_rng(0), 12, 16))
    if kind == "zip":
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
            for name in ("a/1.jpg", "b/2.jpg"):
                z.writestr(name, image)
            link = zipfile.ZipInfo("b/3.jpg")
            link.external_attr = 0o120777 << 16
            z.writestr(link, "2.jpg")
        data = bytearray(out.getvalue())
        if rng.random() < 0.5:  # the directory: version, flags, method, sizes
            at = data.index(b"PK\x01\x02", rng.randrange(max(1, data.rindex(b"PK\x01\x02"))))
            struct.pack_into("<H", data, at + rng.choice([6, 8, 10, 20, 24, 28, 38]), rng.choice([1, 9, 99, 0xFFFF]))
        return kind, bytes(data)
    with tarfile.open(fileobj=out, mode="w:gz" if kind == "tgz" else "w") as tar:
        for name, link in (("a/1.jpg", ""), ("b/2.jpg", ""), ("b/3.jpg", "2.jpg")):
            info = tarfile.TarInfo(name)
            info.size, info.linkname = 0 if link else len(image), link
            info.type = tarfile.SYMTYPE if link else tarfile.REGTYPE
            tar.addfile(info, None if link else io.BytesIO(image))
    return kind, out.getvalue()


@both
def test_damaged_archives(tmp_path, cases):
    def make(rng, case):
        kind, data = archives(rng)
        path = tmp_path / f"{case}.{kind}"  # a new name, because open archives are cached by name
        path.write_bytes(damaged(data, rng) if kind != "zip" or rng.random() < 0.7 else data)
        return path

    def read(path):
        source = open_images("zip", str(path), open_files(path))
        store_many([ref for _, ref, _ in source.items()], Options())

    fuzz(make, read, cases, tmp_path)


@both
def test_damaged_cifar_pickles(tmp_path, cases):
    rows = np.zeros((3, 3072), np.uint8)
    good = [
        pickle.dumps({b"labels": labels, b"data": rows[:, :9]}, protocol)
        for protocol in (2, 4)
        for labels in ([1, 2, 3], np.array([1, 2, 3]), np.array(["a", None, 3], object))
    ]
    fuzz(lambda rng, _: damaged(rng.choice(good), rng), lambda data: read_pickle(data, "batch"), cases, tmp_path)


@both
def test_damaged_lists(tmp_path, cases):
    lines = [
        b"a.jpg 0",
        b"b c.jpg 1",
        b"d.jpg,cat",
        b'"e, f.jpg",dog',
        b"g.jpg\tn1\t3\t4",
        b"h.jpg",
        b"i.jpg -1",
        b"\xef\xbb\xbf",
        b"path,label",
        b",",
        b"\t\t",
        b'"',
        b"99999999999999999999",
        b"j.jpg 0.5",
    ]

    def make(rng, _):
        text = b"\n".join(rng.choice(lines) for _ in range(rng.randint(0, 3))) * 2
        (tmp_path / "l.txt").write_bytes(damaged(text, rng) if text and rng.random() < 0.5 else text)
        return rng.choice([None, None, "2", "2-", "2-3", "x", "1", "9999999"])

    fuzz(make, lambda columns: list(open_list(str(tmp_path / "l.txt"), None, columns).items()), cases, tmp_path)


DISKS = b"PK\x06\x07" + struct.pack("<LQL", 0, 0, 2) + b"PK\x05\x06" + bytes(18)  # the end of a zip on two disks


@pytest.mark.parametrize(
    "read, data",
    [
        (weights.read, DISKS),
        (open_files, DISKS),
        (open_files, b"\x1f\x8b\x08\x04" + bytes(6)),  # gzip, cut off before an extra field
        (lambda path: open_list(str(path), None, None), b"a" * 5000 + b".jpg 0\n"),
    ],
)
def test_what_coverage_guided_fuzzing_has_found(tmp_path, read, data):
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(ValueError):
        read(tmp_path / "a")
