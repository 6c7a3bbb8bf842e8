"""`fastssl eval` and `fastssl export` as a user calls them: run folders, exports, weight files, baselines, mistakes."""

import json
import re
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import photo, write_beton

import fastssl.eval
import fastssl.report
from fastssl import backbones, config, views, weights
from fastssl.checkpoint import store
from fastssl.config import Backbone, Data, Run
from fastssl.eval.common import cache, features
from fastssl.eval.common.features import Extractor
from fastssl.files import write_json
from fastssl.kernels.augment import View
from fastssl.loader import Loader
from fastssl.methods import simclr
from fastssl.weights import export

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
        card = {
            "format": 1,
            "samples": n,
            "bytes": size,
            "max_pixels": 400,
            "min_side": 20,
            "max_height": 20,
            "max_width": 20,
            "classes": list("abcdef"),
            "label": "int",
        }
        (folder / f"{name}.json").write_text(json.dumps(card))
    return out


@pytest.fixture(scope="module")
def run_folder(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run = Run(
        method=simclr.Config(),
        backbone=SPEC,
        name="x",
        data=Data(train=files[0], test=files[1], views=views.simclr(16, mean=(0.4, 0.4, 0.4))),
    )
    (folder / "config.json").write_text(json.dumps(config.dump(run)))
    torch.manual_seed(3)
    temporary = store.create(folder, 5)
    state = {"backbone." + k: v for k, v in backbones.build(SPEC).state_dict().items()} | {"projector": torch.ones(3)}
    safetensors.torch.save_file(state, temporary / "weights.safetensors")
    store.commit(temporary, 1)
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


def test_the_default_k_fits_a_small_bank(run_folder, files, tmp_path, capsys):
    assert call("knn", run_folder, "--out", tmp_path / "a.json") == 0
    assert [row["k"] for row in json.loads((tmp_path / "a.json").read_text())["results"]] == [10, 20]  # of 60 images
    capsys.readouterr()
    assert call("knn", run_folder, "--k", "5,61") == 2
    out, err = capsys.readouterr()
    assert "--k 61: must be between 1 and 60, the images of" in err and "features of" not in out


def test_results_of_a_run_are_saved_in_its_folder(run_folder, files, tmp_path, capsys):
    """The report finds them; options other than the defaults are in the name; for a weight file none is written."""
    run = tmp_path / "run"
    shutil.copytree(run_folder, run, ignore=shutil.ignore_patterns("eval", "features"))
    other = tmp_path / "other.beton"
    shutil.copy(files[1], other), shutil.copy(files[1].replace(".beton", ".json"), other.with_suffix(".json"))
    for argv in (
        [run],
        [run, "--features", "pixels"],
        [run, "--test", other],
        [store.newest(run)],
        [run, "--out", tmp_path / "mine.json"],
    ):
        assert call("knn", *argv, "--k", 3) == 0, capsys.readouterr().err
    assert call("linear", run, "--recipe", "moco", "--epochs", 1, "--probe-batch", 20) == 0
    saved = {p.name for p in (run / "eval").iterdir()}
    assert saved == {"knn.json", "knn-pixels.json", "knn-other.json", "knn-step_00000005.json", "linear-moco.json"}
    assert (tmp_path / "mine.json").exists()
    assert f"saved as {run / 'eval' / 'knn-pixels.json'}" in capsys.readouterr().out
    data = ["--train", files[0], "--test", files[1], "--size", 16, "--k", 3, "--features", "pixels"]
    assert call("knn", *data) == 0 and "saved" not in capsys.readouterr().out
    assert fastssl.report.main([str(run), "--points", "0", "--out", str(tmp_path / "r.html")]) == 0
    assert "knn-pixels.json" in (tmp_path / "r.html").read_text()


def test_every_way_to_name_the_same_weights(run_folder, files, tmp_path, capsys):
    """The run folder, its checkpoint, an export and a state dict of the same network give the same numbers."""
    exported, plain = tmp_path / "b.safetensors", tmp_path / "b.pth"
    assert export.main([str(run_folder), "--to", "safetensors", "--out", str(exported)]) == 0
    net = backbones.build(SPEC)
    weights.load_backbone(exported, net)
    torch.save({"state_dict": net.state_dict()}, plain)
    data = ["--train", files[0], "--test", files[1], "--mean", "0.4,0.4,0.4", "--size", 16]
    given = ["--backbone", "resnet10", "--stem", "cifar", "--width", 8]
    results = []
    for target in ([run_folder], [store.newest(run_folder)], [exported, *data], [plain, *data, *given]):
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
    assert (
        call(
            "linear",
            run_folder,
            "--solver",
            "lbfgs",
            "--grid",
            "0.001,0.1",
            "--epochs",
            30,
            "--precision",
            "bf16",
            "--out",
            tmp_path / "a.json",
        )
        == 0
    )
    result = json.loads((tmp_path / "a.json").read_text())
    assert [r["l2"] for r in result["selection"]] == [0.001, 0.1] and result["of"]["precision"] == "bf16"


def test_the_classifier_in_a_file(run_folder, files, tmp_path, capsys):
    """The classifier predicts the class with the nearest mean feature, which is computed from extracted features."""
    assert call("extract", run_folder, "--folder", tmp_path / "f") == 0
    x = {part: torch.from_numpy(np.load(tmp_path / "f" / f"{part}_last.npy")) for part in ("train", "test")}
    y = {part: torch.from_numpy(np.load(tmp_path / "f" / f"{part}_labels.npy")) for part in ("train", "test")}
    means = torch.stack([x["train"][y["train"] == c].mean(0) for c in range(6)])
    means += 2 * means.std(0) * torch.randn(means.shape, generator=torch.Generator().manual_seed(0))  # for some errors
    net = backbones.build(SPEC)
    weights.load_backbone(run_folder, net)
    head = {"head.fc_cls.weight": 2 * means, "head.fc_cls.bias": -means.square().sum(1)}
    file = tmp_path / "theirs.pth"
    torch.save({"state_dict": {"backbone." + k: v for k, v in net.state_dict().items()} | head}, file)
    bare = [
        file,
        "--test",
        files[1],
        "--backbone",
        "resnet10",
        "--stem",
        "cifar",
        "--width",
        8,
        "--size",
        16,
        "--mean",
        "0.4,0.4,0.4",
    ]
    assert call("classifier", *bare, "--out", tmp_path / "a.json") == 0
    (row,) = json.loads((tmp_path / "a.json").read_text())["results"]
    nearest = torch.cdist(x["test"].double(), means.double()).argsort(1)
    assert row["top1"] == pytest.approx(100 * (nearest[:, 0] == y["test"]).float().mean().item())
    assert row["top5"] == pytest.approx(100 * (nearest[:, :5] == y["test"][:, None]).any(1).float().mean().item())
    assert 20 < row["top1"] < 100

    capsys.readouterr()
    assert call("classifier", run_folder) == 2
    assert "holds 0 classifiers on 64 features (none): `fastssl eval linear` trains one" in capsys.readouterr().err
    assert call("classifier", *bare, "--head", "fc") == 2
    assert "has no such linear layer on 64 features; it has state_dict.head.fc_cls" in capsys.readouterr().err
    torch.save(torch.load(file)["state_dict"] | {"fc.weight": means[:2], "fc.bias": torch.zeros(2)}, file)
    assert call("classifier", *bare) == 2
    assert "holds 2 classifiers on 64 features (head.fc_cls, fc): choose one" in capsys.readouterr().err
    assert call("classifier", *bare, "--head", "fc") == 2
    assert "the test set has class 5, the classifier 2 classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, text",
    [
        (["knn", "nowhere"], "no run folder or weight file nowhere"),
        (["knn", "RUN", "--k", "5,61"], "must be between 1 and 60"),
        (["knn", "RUN", "--k", "five"], "'five' is not a comma-separated list of numbers"),
        (["knn", "RUN", "--temp", "1"], "unrecognized arguments: --temp"),
        (["knn", "RUN", "--stem", "cifar"], "names its backbone .resnet10.: leave out"),
        (["knn", "PTH", "--train", "TRAIN", "--test", "TEST"], "give --backbone NAME"),
        (["knn", "PTH", "--backbone", "resnet18", "--train", "TRAIN"], "give --test NAME.beton"),
        (["knn", "PTH", "--backbone", "resnet10", "--train", "TRAIN", "--test", "TEST"], "stem right"),
        (["knn", "PTH", "--backbone", "resnet1", "--train", "TRAIN", "--test", "TEST"], "did you mean 'resnet1[08]'"),
        (["knn", "--backbone", "resnet18", "--train", "TRAIN", "--test", "TEST"], "give a run folder or a weight file"),
        (["linear", "RUN", "--held-out", "1"], "held_out=1.0"),
        (["linear", "RUN", "--recipe", "moco", "--solver", "sgd"], "leave it out with --recipe moco"),
        (["linear", "RUN", "--recipe", "moco"], "batch=256.*use at most 60"),
        (["linear", "RUN", "--solver", "lbfgs", "--probe-batch", "8"], "--probe-batch 8 is for --solver sgd"),
        (["semisup", "RUN", "--no-cache"], "unrecognized arguments: --no-cache"),
        (["maps", "RUN", "--train", "TRAIN"], "unrecognized arguments: --train"),
        (["detection", "RUN", "--size", "9"], "unrecognized arguments: --size 9"),
        (["linear", "RUN", "--layers", "stem"], "--layers is for the published recipes"),
        (["linear", "RUN", "--epochs", "0"], "epochs=0"),
        (["knn", "RUN", "--cache", "x", "--no-cache"], "exclude each other"),
        (["linear", "RUN", "--test", "missing.beton"], "missing.beton"),
        (["liner", "RUN"], "unknown protocol 'liner'; did you mean 'linear'"),
        (["nothing"], "unknown protocol 'nothing'; known are knn, linear"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_mistakes_are_one_line_and_exit_code_2(run_folder, files, tmp_path, capsys, argv, text):
    torch.save(backbones.build(SPEC).state_dict(), tmp_path / "a.pth")
    names = {"RUN": run_folder, "PTH": tmp_path / "a.pth", "TRAIN": files[0], "TEST": files[1]}
    assert call(*(names.get(word, word) for word in argv)) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert re.search(text, err), err


def test_features_are_cached_beside_the_run(run_folder, files, tmp_path, capsys):
    assert call("knn", run_folder, "--k", "3", "--no-cache") == 0
    assert "features of" not in capsys.readouterr().out
    folders = lambda folder: {p.name for p in (folder / "features").glob("*")}  # noqa: E731
    before = folders(run_folder)
    checkpointed = store.newest(run_folder)
    assert call("knn", checkpointed, "--k", "3", "--mean", "0.3,0.3,0.3") == 0
    assert "computing 1 of 1 shards" in capsys.readouterr().out
    assert len(folders(run_folder) - before) == 2, "also of the run's checkpoint"
    assert call("linear", run_folder, "--epochs", 2, "--mean", "0.3,0.3,0.3") == 0, "the other protocol reads them"
    printed = capsys.readouterr().out
    assert printed.count("read from") == 2 and "computing" not in printed
    assert call("knn", run_folder, "--k", "3", "--cache", tmp_path / "c") == 0
    assert len(list((tmp_path / "c").iterdir())) == 2
    plain = tmp_path / "weights" / "a.pth"
    plain.parent.mkdir()
    torch.save(backbones.build(SPEC).state_dict(), plain)
    data = ["--train", files[0], "--test", files[1], "--size", 16, "--backbone", "resnet10", "--stem", "cifar"]
    assert call("knn", plain, *data, "--width", 8, "--k", "3") == 0
    assert len(folders(plain.parent)) == 2
    assert call("knn", plain, *data, "--width", 8, "--k", "3", "--features", "pixels", "--no-cache") == 0


@pytest.mark.parametrize("recipe, more", [("moco", ["--held-out", "0.2"]), ("multi", ["--no-augment"])])
def test_published_linear_protocols(run_folder, tmp_path, capsys, recipe, more):
    out = tmp_path / "a.json"
    assert (
        call(
            "linear",
            run_folder,
            "--recipe",
            recipe,
            "--epochs",
            2,
            "--probe-batch",
            20,
            "--grid",
            "0.1,1",
            *more,
            "--out",
            out,
        )
        == 0
    )
    result = json.loads(out.read_text())
    assert result["options"]["recipe"] == recipe and result["options"]["published"] in ("test", "none")
    selected = [row["selected_on"] for row in result["results"]]
    want = ["none", "none", "test"] + ["held-out"] * (recipe == "moco")
    assert selected == want * (1 if recipe == "moco" else 5)
    printed = capsys.readouterr().out
    assert "selected_on=test" in printed and "epoch=2" in printed


def test_extract(run_folder, files, tmp_path, capsys):
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


def test_features_that_do_not_fit_into_memory_twice_are_refused(run_folder, monkeypatch, capsys):
    monkeypatch.setattr(features, "free_memory", lambda device: 60 * 64 * 4 * 2 - 1)  # --no-cache holds it twice
    assert call("knn", run_folder, "--k", 3, "--no-cache") == 2
    assert "less (this one 0.0 GiB): take fewer --layers, or eval extract" in capsys.readouterr().err
    assert call("knn", run_folder, "--k", 3) == 0


def interrupt(*_):
    raise KeyboardInterrupt


def test_nan_and_infinity_in_json(tmp_path):
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
    loader = Loader(files[1], 33, device="cpu", workers=1, shuffle=False, drop_last=False)
    want = features.extract(Extractor(net, sheet), loader)[0]
    got = torch.from_numpy(np.load(tmp_path / "whole" / "test_last.npy"))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert call(*bare, "--folder", tmp_path / "out") == 2
    assert "give --train or --test NAME.beton" in capsys.readouterr().err
    assert call(*bare, "--test", files[1], "--only", "train", "--folder", tmp_path / "none") == 2
    assert "give --train NAME.beton" in capsys.readouterr().err and not (tmp_path / "none").exists()


@pytest.mark.parametrize("prefix", ["", "module.encoder_q."])
def test_sobel_filters_are_detected_in_a_weight_file(files, tmp_path, prefix):
    out = tmp_path / "a.json"
    for sobel in (True, False):
        net = backbones.build(Backbone("resnet10", stem="cifar", width=8, sobel=sobel))
        torch.save({prefix + key: value for key, value in net.state_dict().items()}, tmp_path / "a.pth")
        assert (
            call(
                "knn",
                tmp_path / "a.pth",
                "--backbone",
                "resnet10",
                "--stem",
                "cifar",
                "--width",
                8,
                "--size",
                16,
                "--train",
                files[0],
                "--test",
                files[1],
                "--k",
                "3",
                "--out",
                out,
            )
            == 0
        )
        assert json.loads(out.read_text())["of"]["backbone"]["sobel"] is sobel


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
    assert export.main([str(run_folder), "--to", "timm"]) == 2
    assert "timm has no resnet10 of width" in capsys.readouterr().err
    torch.save(net.state_dict(), tmp_path / "bare.pth")
    assert export.main([str(tmp_path / "bare.pth")]) == 2
    assert "neither a run folder nor an export" in capsys.readouterr().err
