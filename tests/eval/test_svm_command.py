"""`fastssl eval svm` on files with several labels an image."""

import json
import re

import numpy as np
import pytest
from command_tools import call
from conftest import photo, write_beton, write_card


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, rng, out = tmp_path_factory.mktemp("files"), np.random.default_rng(0), []
    for name, n in (("train", 60), ("test", 50)):
        labels = [(rng.random(3) < 0.4).astype(np.float32) for _ in range(n)]
        images = [(photo(rng, 20, 14) // 4 + 120 * y).astype(np.uint8) for y in labels]
        labels[5][1] = -1
        path = write_beton(folder / f"{name}.beton", images, labels)
        out.append(str(write_card(path, images, list("abc"), "multi")))
    return out


def svm_command(files, *argv):
    network = ("--features", "untrained", "--backbone", "resnet10", "--stem", "cifar", "--width", 8, "--size", 16)
    return call("svm", "--train", files[0], "--test", files[1], *network, *argv)


def test_eval_svm_evaluates_a_run(files, tmp_path, capsys):
    out = tmp_path / "a.json"
    assert svm_command(files, "--layers", "stem,last", "--out", out) == 0, capsys.readouterr().err
    result = json.loads(out.read_text())
    assert [(row["layer"], row.get("selected_on")) for row in result["results"]][:2] == [("stem", None), ("last", None)]
    assert [row["selected_on"] for row in result["results"][2:]] == ["test", "held-out"]
    assert result["results"][2]["map"] == max(row["map"] for row in result["results"][:2])
    assert result["options"]["crop"] == "squash" and len(result["classes"]["last"]) == 3
    assert "mAP %" in capsys.readouterr().out
    assert svm_command(files, "--low-shot", "--shots", "1,4", "--samples", 2, "--out", out) == 0, (
        capsys.readouterr().err
    )
    result = json.loads(out.read_text())
    assert [row["shots"] for row in result["results"]] == [1, 1, 4, 4] and result["options"]["fits"] == 2 * 2 * 3 * 19


@pytest.mark.parametrize(
    "argv, text",
    [
        (["--costs", "1,0"], "give positive numbers"),
        (["--folds", 1], "folds=1"),
        (["--folds", 50], "50 folds need as many"),
        (["--shots", 1], "--shots is for the protocol with --low-shot"),
        (["--low-shot", "--folds", 2], "--folds is for the protocol without --low-shot"),
        (["--resize", 20], "--resize 20 is for --crop center"),
        (["--low-shot", "--shots", "0,1"], "shots=.0, 1."),
        (["--layers", "top"], "this backbone has stem"),
        (["--solver", "liblinear"], "invalid choice"),
    ],
    ids=lambda v: " ".join(map(str, v)) if isinstance(v, list) else "",
)
def test_wrong_arguments_raise(files, capsys, argv, text):
    assert svm_command(files, *argv) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err and re.search(text, err), err
