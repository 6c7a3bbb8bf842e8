"""`fastssl eval` and `fastssl export` as a user calls them: run folders, exports, bare weights, baselines, mistakes."""

import json
import re

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import photo, write_beton

import fastssl.eval
from fastssl import backbones, checkpoint, config, export, views, weights
from fastssl.config import Backbone, Data, Run
from fastssl.methods import simclr

SPEC = Backbone("resnet10", stem="cifar", width=8)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two labelled files whose classes differ in tint, with data cards."""
    folder, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    out = []
    for name, n in (("train", 60), ("test", 33)):
        labels = [i % 6 for i in range(n)]
        tint = [[100 * (y & 1), 100 * (y >> 1 & 1), 100 * (y >> 2)] for y in labels]
        images = [(photo(rng, 20, 20) // 4 + t).astype(np.uint8) for t in tint]
        out.append(str(write_beton(folder / f"{name}.beton", images, labels)))
        size = (folder / f"{name}.beton").stat().st_size
        card = {"format": 1, "samples": n, "bytes": size, "max_pixels": 400, "min_side": 20, "max_height": 20,
                "max_width": 20, "classes": list("abcdef"), "label": "int"}  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(card))
    return out


@pytest.fixture(scope="module")
def run_folder(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run = Run(method=simclr.Config(), backbone=SPEC, name="x",
              data=Data(train=files[0], test=files[1], views=views.simclr(16, mean=(0.4, 0.4, 0.4))))  # fmt: skip
    (folder / "config.json").write_text(config.dumps(run))
    torch.manual_seed(3)
    temporary = checkpoint.begin(folder, 5)
    state = {"backbone." + k: v for k, v in backbones.build(SPEC).state_dict().items()} | {"projector": torch.ones(3)}
    safetensors.torch.save_file(state, temporary / "weights.safetensors")
    checkpoint.commit(temporary, 1)
    return folder


def call(*argv):
    """The exit code."""
    argv = [*map(str, argv), "--device", "cpu", "--workers", "1"]
    try:
        code = fastssl.eval.main(argv)
    except SystemExit as stop:
        code = stop.code
    return code


def test_knn_of_a_run(run_folder, tmp_path, capsys):
    out = tmp_path / "deep" / "knn.json"
    assert call("knn", run_folder, "--k", "5,20", "--out", out) == 0
    result = json.loads(out.read_text())
    assert [row["k"] for row in result["results"]] == [5, 20] and set(result["results"][0]) == {"k", "top1", "top5"}
    assert result["results"][0]["top1"] > 60 and result["options"]["temperature"] == 0.07
    view = result["of"]["view"]
    assert (view["size"], view["resize"], view["crop"], view["mean"]) == (16, 16, "center", [0.4, 0.4, 0.4])
    assert result["of"]["backbone"]["width"] == 8 and "projector (1)" in result["of"]["weights"]
    printed = capsys.readouterr().out
    assert "k=5" in printed and f"{result['results'][1]['top1']:.2f}" in printed and "top-5 %" in printed
    assert [p.name for p in out.parent.iterdir()] == ["knn.json"]


def test_every_way_to_name_the_same_weights(run_folder, files, tmp_path, capsys):
    """The run folder, its checkpoint, both exports and a bare state dict of the same network give the same numbers."""
    exported, plain = tmp_path / "b.safetensors", tmp_path / "b.pth"
    assert export.main([str(run_folder), "--to", "safetensors", "--out", str(exported)]) == 0
    net = backbones.build(SPEC)
    weights.load_backbone(exported, net)
    torch.save({"state_dict": net.state_dict()}, plain)
    data = ["--train", files[0], "--test", files[1], "--mean", "0.4,0.4,0.4", "--size", 16]
    given = ["--backbone", "resnet10", "--stem", "cifar", "--width", 8]
    results = []
    for target in ([run_folder], [checkpoint.newest(run_folder)], [exported, *data], [plain, *data, *given]):
        assert call("linear", *target, "--epochs", 5, "--out", tmp_path / "a.json") == 0, capsys.readouterr().err
        result = json.loads((tmp_path / "a.json").read_text())
        results.append((result["results"], result["selection"]))
    assert all(r == results[0] for r in results)
    assert "lr" in results[0][0][0]


def test_baselines_differ_from_the_network(run_folder, tmp_path):
    seen = set()
    for kind in ("weights", "untrained", "pixels"):
        assert call("knn", run_folder, "--k", "3", "--features", kind, "--out", tmp_path / "a.json") == 0
        result = json.loads((tmp_path / "a.json").read_text())
        assert result["of"]["features"] == kind
        seen.add((result["options"]["dim"], result["of"]["weights"]))
    assert len(seen) == 3 and {dim for dim, _ in seen} == {64, 3 * 16 * 16}


def test_pixels_and_untrained_need_no_weights(files, tmp_path):
    data = ["--train", files[0], "--test", files[1], "--size", 16, "--k", "3"]
    assert call("knn", *data, "--features", "pixels") == 0
    assert call("knn", *data, "--features", "untrained", "--backbone", "resnet10", "--width", 8) == 0


def test_lbfgs_and_options(run_folder, tmp_path):
    assert call("linear", run_folder, "--solver", "lbfgs", "--grid", "0.001,0.1", "--epochs", 30, "--precision", "bf16",
                "--out", tmp_path / "a.json") == 0  # fmt: skip
    result = json.loads((tmp_path / "a.json").read_text())
    assert [r["l2"] for r in result["selection"]] == [0.001, 0.1] and result["of"]["precision"] == "bf16"


@pytest.mark.parametrize("argv, text", [
    (["knn", "nowhere"], "no run folder or weight file nowhere"),
    (["knn", "RUN", "--k", "5,61"], "must be between 1 and 60"),
    (["knn", "RUN", "--k", "five"], "'five' is no comma-separated list"),
    (["knn", "RUN", "--temp", "1"], "unrecognized arguments: --temp"),
    (["knn", "RUN", "--stem", "cifar"], "names its backbone .resnet10.: leave out"),
    (["knn", "PTH", "--train", "TRAIN", "--test", "TEST"], "give --backbone NAME"),
    (["knn", "PTH", "--backbone", "resnet18", "--train", "TRAIN"], "give --test NAME.beton"),
    (["knn", "PTH", "--backbone", "resnet10", "--train", "TRAIN", "--test", "TEST"], "stem right"),
    (["knn", "PTH", "--backbone", "resnet1", "--train", "TRAIN", "--test", "TEST"], "did you mean 'resnet1[08]'"),
    (["knn", "--backbone", "resnet18", "--train", "TRAIN", "--test", "TEST"], "give a run folder or a weight file"),
    (["linear", "RUN", "--held-out", "1"], "held_out=1.0"),
    (["linear", "RUN", "--test", "missing.beton"], "missing.beton"),
    (["liner", "RUN"], "unknown protocol 'liner'; did you mean 'linear'"),
    (["nothing"], "unknown protocol 'nothing'; known are knn, linear"),
], ids=lambda v: " ".join(v) if isinstance(v, list) else "")  # fmt: skip
def test_mistakes_are_one_line_and_exit_code_2(run_folder, files, tmp_path, capsys, argv, text):
    torch.save(backbones.build(SPEC).state_dict(), tmp_path / "a.pth")
    names = {"RUN": run_folder, "PTH": tmp_path / "a.pth", "TRAIN": files[0], "TEST": files[1]}
    assert call(*(names.get(word, word) for word in argv)) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert re.search(text, err), err


def test_export(run_folder, tmp_path, capsys):
    net = backbones.build(SPEC)
    weights.load_backbone(run_folder, net)
    assert export.main([str(run_folder), "--to", "safetensors"]) == 0
    assert "load_file" in capsys.readouterr().out
    file = run_folder / "backbone.safetensors"
    assert weights.spec_of(file) == SPEC
    state = safetensors.torch.load_file(file)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    file.unlink()
    assert export.main([str(run_folder), "--to", "torchvision"]) == 2
    assert "torchvision has no resnet10" in capsys.readouterr().err
    torch.save(net.state_dict(), tmp_path / "bare.pth")
    assert export.main([str(tmp_path / "bare.pth")]) == 2
    assert "no run folder" in capsys.readouterr().err
