"""`fastssl eval` as a user calls it: run folders, exports, weight files, baselines, mistakes."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from command_tools import SPEC, call, files_fixture, run_folder_fixture  # noqa: F401

import fastssl.eval
import fastssl.report
from fastssl import backbones, weights
from fastssl.checkpoint import disk
from fastssl.config import Backbone
from fastssl.eval.common import features
from fastssl.weights import export


def test_eval_knn_evaluates_a_run(run_folder, tmp_path, capsys):
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
    assert "k=(5, 61): must be between 1 and 60" in err and "features of" not in out


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
        [disk.newest(run)],
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
    for target in ([run_folder], [disk.newest(run_folder)], [exported, *data], [plain, *data, *given]):
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


def test_eval_linear_takes_lbfgs_and_its_options(run_folder, tmp_path):
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


def test_eval_classifier_finds_the_classifier_in_a_file(run_folder, files, tmp_path, capsys):
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
    checkpointed = disk.newest(run_folder)
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
def test_eval_linear_runs_the_published_recipes(run_folder, tmp_path, capsys, recipe, more):
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


def test_features_that_do_not_fit_into_memory_twice_are_refused(run_folder, monkeypatch, capsys):
    monkeypatch.setattr(features, "free_memory", lambda device: 60 * 64 * 4 * 2 - 1)  # --no-cache holds it twice
    assert call("knn", run_folder, "--k", 3, "--no-cache") == 2
    assert "less (this one 0.0 GiB): take fewer --layers, or eval extract" in capsys.readouterr().err
    assert call("knn", run_folder, "--k", 3) == 0


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
