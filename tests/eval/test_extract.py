"""`fastssl eval extract` and `fastssl export` as a user calls them."""

import json
import re
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from command_tools import SPEC, call, files_fixture, run_folder_fixture  # noqa: F401

from fastssl import backbones, weights
from fastssl.eval.common import cache, features
from fastssl.eval.common.features import Extractor
from fastssl.files import write_json
from fastssl.kernels.augment import View
from fastssl.loader import Loader
from fastssl.sampler import Sampler
from fastssl.weights import export


def test_extract_writes_features_and_labels(run_folder, files, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["extract", run_folder, "--layers", "layer4,last", "--folder", out]
    assert call(*command, "--out", tmp_path / "a.json") == 0
    names = {f"{split}_{part}.npy" for split in ("train", "test") for part in ("layer4", "last", "labels")}
    assert {p.name for p in out.iterdir()} == names
    result = json.loads((tmp_path / "a.json").read_text())
    assert [(r["file"], r["layer"], r["rows"], r["dim"]) for r in result["results"]] == [
        ("train", "layer4", 60, 256),
        ("train", "last", 60, 64),
        ("test", "layer4", 33, 256),
        ("test", "last", 33, 64),
    ]
    arrays = {name: np.load(out / name) for name in names}
    assert arrays["test_labels.npy"].tolist() == [i % 6 for i in range(33)]
    layer4 = torch.from_numpy(arrays["test_layer4.npy"]).view(33, 64, 4)
    torch.testing.assert_close(layer4.mean(2), torch.from_numpy(arrays["test_last.npy"]))  # the same rows in both files
    (out / "train_last.npy").unlink()
    assert call(*command) == 2 and not (out / "train_last.npy").exists(), "no incomplete file"
    assert re.search(r"train_layer4.npy exists: .*--force", capsys.readouterr().err)
    assert call(*command, "--force") == 0 and {p.name for p in out.iterdir()} == names
    assert call(*command, "--only", "test", "--to", "safetensors") == 0
    state = safetensors.torch.load_file(out / "test.safetensors")
    assert set(state) == {"layer4", "last", "labels"} and np.array_equal(state["last"], arrays["test_last.npy"])
    assert call("extract", run_folder, "--layers", "all") == 0
    assert len(list((run_folder / "eval").glob("*.npy"))) == 2 * 7
    assert call("extract", run_folder, "--layers", "stem,top", "--folder", out) == 2
    assert "no top; this backbone has stem" in capsys.readouterr().err


@pytest.mark.parametrize("more", [["--no-cache"], []])
def test_extract_writes_shard_by_shard(run_folder, tmp_path, monkeypatch, capsys, more):
    argv = ["extract", run_folder, "--layers", "stem,last", "--only", "train", "--batch", 14]
    assert call(*argv, "--to", "safetensors", "--folder", tmp_path / "whole", "--no-cache") == 0
    want = safetensors.torch.load_file(tmp_path / "whole" / "train.safetensors")
    monkeypatch.setattr(cache, "SHARD_ROWS", 8)
    for module, name in ((cache, "load_or_extract"), (features, "extract")):  # these hold all rows in memory
        monkeypatch.setattr(module, name, None)
    more = more or ["--cache", tmp_path / "cache"]
    for _ in range(2):  # computed, then, with a cache, read
        assert call(*argv, *more, "--folder", tmp_path / "out", "--force") == 0, capsys.readouterr().err
        for name, part in want.items():
            assert np.array_equal(np.load(tmp_path / "out" / f"train_{name}.npy"), part)
    assert len(list((tmp_path / "cache").glob("*/0*"))) == (8 if "--cache" in more else 0)
    (tmp_path / "out" / "train_last.npy").write_text("old")
    monkeypatch.setattr(cache, "_finish_shard", interrupt)
    with pytest.raises(KeyboardInterrupt):
        call(*argv, "--no-cache", "--folder", tmp_path / "out", "--force")
    assert (tmp_path / "out" / "train_last.npy").read_text() == "old" and not list(tmp_path.glob("out/*.tmp"))
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    assert call(*argv, "--no-cache", "--folder", tmp_path / "full") == 2
    assert "give another --folder" in capsys.readouterr().err and not list(tmp_path.glob("full/*"))


def interrupt(*_):
    raise KeyboardInterrupt


def test_json_has_nan_and_infinity_as_strings(tmp_path):
    result = {"results": [{"loss": float("nan"), "k": 3}], "x": (float("-inf"), 1.5)}
    write_json(tmp_path / "a.json", result)
    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=interrupt) == {
        "results": [{"loss": "nan", "k": 3}],
        "x": ["-inf", 1.5],
    }


def test_one_file_is_enough_for_extract(files, tmp_path, capsys):
    torch.save(backbones.build(SPEC).state_dict(), tmp_path / "a.pth")
    bare = ["extract", tmp_path / "a.pth", "--backbone", "resnet10", "--stem", "cifar", "--width", 8, "--size", 16]
    assert call(*bare, "--test", files[1], "--folder", tmp_path / "out") == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"test_last.npy", "test_labels.npy"}
    assert call(*bare, "--test", files[1], "--folder", tmp_path / "whole", "--squash", "--size", 12) == 0
    net, sheet = backbones.build(SPEC), View(12, crop="squash")
    weights.load_backbone(tmp_path / "a.pth", net)
    loader = Loader(files[1], 33, Sampler.sequential(), device="cpu", workers=1)
    want = features.extract(Extractor(net, sheet), loader)[0]
    got = torch.from_numpy(np.load(tmp_path / "whole" / "test_last.npy"))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert call(*bare, "--folder", tmp_path / "out") == 2
    assert "give --train or --test NAME.beton" in capsys.readouterr().err
    assert call(*bare, "--test", files[1], "--only", "train", "--folder", tmp_path / "none") == 2
    assert "give --train NAME.beton" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_export_writes_the_weights_of_a_run(run_folder, tmp_path, capsys):
    net = backbones.build(SPEC)
    weights.load_backbone(run_folder, net)
    assert export.main([str(run_folder), "--to", "safetensors"]) == 0
    assert "load_file" in capsys.readouterr().out
    file = run_folder / "backbone.safetensors"
    assert weights.spec_of(file) == SPEC
    state = safetensors.torch.load_file(file)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    file.unlink()
    assert export.main([str(run_folder), "--to", "timm"]) == 2
    assert "timm has no resnet10 of width" in capsys.readouterr().err
    torch.save(net.state_dict(), tmp_path / "bare.pth")
    assert export.main([str(tmp_path / "bare.pth")]) == 2
    assert "neither a run folder nor an export" in capsys.readouterr().err
