"""The feature cache: the bits that were computed, read for the same key alone, resumed, and not read when damaged."""

import json
import re
import shutil
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastssl import backbones, dist, views
from fastssl.config import Backbone
from fastssl.eval.common import cache, features
from fastssl.eval.common.features import Extractor
from fastssl.loader import Loader
from fastssl.sampler import Sampler

(VIEW,) = views.center(16, 18)
LAYERS = ("stem", "layer4", "last")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(cache, "SHARD_ROWS", 20)  # 103 samples: five shards and one of three rows


def net(seed=0, **options):
    torch.manual_seed(seed)
    return backbones.build(Backbone("resnet10", **{"stem": "cifar", "width": 8, **options}))


class RecordingLoader(Loader):
    """Records the rows that are decoded."""

    def _load(self, rows):
        self.__dict__.setdefault("rows", []).extend(rows.tolist())
        return super()._load(rows)


def load(path, batch=16):
    return RecordingLoader(path, batch, Sampler.sequential(), device="cpu", workers=1)


def cached(folder, loader, backbone=None, layers=LAYERS, view=VIEW, precision="fp32"):
    return cache.load_or_extract(folder, Extractor(backbone or net(), view, layers, precision), loader)


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.fixture(scope="module")
def want(beton):
    return features.extract(Extractor(net(), VIEW, layers=LAYERS), load(beton))


def key(folder):
    (only,) = folder.iterdir()
    return only


def test_cached_features_equal_computed_ones(beton, want, tmp_path, capsys):
    assert same(cached(tmp_path, load(beton)), want)
    assert "computing 6 of 6 shards" in capsys.readouterr().out
    loader = load(beton)
    assert same(cached(tmp_path, loader), want) and not hasattr(loader, "rows"), "nothing was decoded"
    assert "read from" in capsys.readouterr().out
    folder = key(tmp_path)
    assert sorted(p.name for p in folder.iterdir()) == [*(f"{k:05d}" for k in range(6)), "manifest.json"]
    shard = np.load(folder / "00005" / "layer4.npy", mmap_mode="r")
    assert shard.shape == (3, 64 * 4) and isinstance(shard, np.memmap)
    about = json.loads((folder / "manifest.json").read_text())
    assert about["samples"] == 103 and about["dims"] == {"stem": 8 * 256, "layer4": 256, "last": 64}


@pytest.mark.parametrize("batch", [7, 20, 200])
def test_shards_and_batches_of_different_sizes(beton, want, tmp_path, batch):
    got = cached(tmp_path, load(beton, batch))
    for x, y in zip(got, want):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    assert same(got, features.extract(Extractor(net(), VIEW, layers=LAYERS), load(beton, batch))), (
        "bit for bit, of equal batches"
    )


def test_the_key_covers_all_that_decides_the_values(beton, tmp_path):
    loader, few = load(beton), ("last",)
    cached(tmp_path, loader, layers=few)
    nudged = net()
    with torch.no_grad():
        nudged.layer4[0].bn2.running_mean[0] += 1e-3  # a buffer counts as well
    for change in (
        {"backbone": nudged},
        {"backbone": net(1)},
        {"view": replace(VIEW, mean=(0.5, 0.5, 0.5))},
        {"precision": "bf16"},
        {"layers": ("stem", "last")},
        {"backbone": net(norm="gn")},
    ):
        before = len(list(tmp_path.iterdir()))
        cached(tmp_path, loader, **{"layers": few, **change})
        assert len(list(tmp_path.iterdir())) == before + 1, change
    before = len(list(tmp_path.iterdir()))
    loader.card = replace(loader.card, sha256="0" * 64)
    cached(tmp_path, loader, layers=few)
    assert len(list(tmp_path.iterdir())) == before + 1, "other data"
    cached(tmp_path, load(beton, 50), layers=few)
    cached(tmp_path, load(beton), backbones.channels_last_(net()), layers=few)
    assert len(list(tmp_path.iterdir())) == before + 1, "neither the batch nor the memory layout"


def test_an_interrupted_extraction_continues(beton, want, tmp_path, monkeypatch):
    write, written = cache.FeatureStore.write, []

    def interrupted(self, k, parts):
        if k == 3:
            raise KeyboardInterrupt
        write(self, k, parts)
        written.append(k)

    monkeypatch.setattr(cache.FeatureStore, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, load(beton))
    folder = key(tmp_path)
    assert written == [0, 1, 2] and not (folder / "manifest.json").exists()
    (folder / "00003.tmp.left").mkdir()  # of a killed process: no shard
    monkeypatch.setattr(cache.FeatureStore, "write", write)
    loader = load(beton)
    assert same(cached(tmp_path, loader), want)
    assert min(loader.rows) == 48, "the batch that holds row 60 begins at 48; nothing before was decoded"
    assert (folder / "manifest.json").exists()


def truncate(file):
    file.write_bytes(file.read_bytes()[:-40])


def empty(file):
    file.write_bytes(b"")


def wrong_shape(file):
    np.save(file, np.load(file)[:-1])


def wrong_type(file):
    np.save(file, np.load(file).astype(np.float64))


def nan(file):
    x = np.load(file)
    x[0, 0] = np.nan
    np.save(file, x)
    seal = file.parent / "crc32.json"
    seal.write_text(json.dumps({**json.loads(seal.read_text()), file.stem: zlib.crc32(x)}))


def flip(file):
    x = np.load(file)
    x[2, 1] += 1e-3
    np.save(file, x)


def without_sums(file):
    (file.parent / "crc32.json").unlink()


@pytest.mark.parametrize(
    "damage, text",
    [
        (truncate, ""),
        (empty, ""),
        (wrong_shape, r"holds float32 \(19, 64\), not float32 \(20, 64\)"),
        (wrong_type, "holds float64"),
        (nan, "NaN or infinite"),
        (flip, "has changed"),
        (without_sums, ""),
        (lambda file: file.unlink(), "No such file"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_a_damaged_shard_is_named_and_computed_again(beton, tmp_path, capsys, damage, text):
    want = cached(tmp_path, load(beton), layers=("last",))
    file = key(tmp_path) / "00002" / "last.npy"
    damage(file)
    capsys.readouterr()
    loader = load(beton)
    assert same(cached(tmp_path, loader, layers=("last",)), want)
    printed = capsys.readouterr().out
    name = str(file if damage is not without_sums else file.parent)
    assert f"features: {name} is damaged" in printed and re.search(text, printed), printed
    assert "computing 1 of 6 shards" in printed
    assert min(loader.rows) == 32, "the other shards were read"
    assert same(cached(tmp_path, load(beton), layers=("last",)), want)
    assert "read from" in capsys.readouterr().out


def test_features_that_are_nan_are_not_cached(beton, tmp_path):
    broken = net()
    with torch.no_grad():
        broken.layer4[0].bn2.bias[0] = torch.nan
    with pytest.raises(ValueError, match="20 of 20 features are NaN or infinite .first: sample 0.: the training"):
        cached(tmp_path, load(beton), broken, layers=("last",))
    assert not list(tmp_path.rglob("*.npy"))


def test_a_full_disk_and_a_missing_folder_raise(beton, tmp_path, monkeypatch):
    full = lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(cache.shutil, "disk_usage", full)
        with pytest.raises(ValueError, match=r"needs 0.0 GiB, .* free: give --cache DIR elsewhere, or --no-cache"):
            cached(tmp_path, load(beton))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/.*--no-cache"):
        cached(tmp_path / "file", load(beton), layers=("last",))


def on_two_ranks(beton, folder):
    cache.SHARD_ROWS = 20
    result = {}
    for batch in (16, 102):  # 102: the last batch has one sample, the second rank none of it
        result[batch] = cached(Path(folder) / str(batch), load(beton, batch))
    result["again"] = cached(Path(folder) / "16", load(beton, 16))
    file = next((Path(folder) / "16").glob("*/00001/stem.npy"))
    if dist.is_main():
        file.write_bytes(b"")
    dist.barrier()
    result["shards"] = {}
    for name, place in (("none", None), ("cached", Path(folder) / "16")):
        seen = result["shards"][name] = []
        cache.for_each_shard(
            place,
            Extractor(net(), VIEW, LAYERS, "fp32"),
            load(beton, 16),
            lambda first, parts, seen=seen: seen.append((first, [part.clone() for part in parts])),
        )
    result["repaired"] = cached(Path(folder) / "16", load(beton, 16))
    try:
        cached(Path(beton), load(beton, 16))
    except ValueError as error:
        result["error"] = str(error)
    return result
