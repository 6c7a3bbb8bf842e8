"""`fastssl eval semisup`: subsets, the published settings, and the command, also stopped and continued."""

import argparse
import json
from dataclasses import replace

import numpy as np
import pytest
from stripes import (
    VIEW,
    Linear,
    call,
    evaluation,
    files_fixture,  # noqa: F401
)

from fastssl import views
from fastssl.eval import finetune, options, semisup
from fastssl.eval.common import finetuning
from fastssl.kernels.augment import View


def test_a_drawn_subset_is_balanced_and_seeded():
    labels = np.repeat([0, 1, 2], [300, 100, 20])
    rows = semisup.balanced(labels, 10, 0)
    assert np.bincount(labels[rows]).tolist() == [30, 10, 2] and (np.diff(rows) > 0).all()
    assert np.bincount(labels[semisup.balanced(labels, 1, 0)]).tolist() == [3, 1, 1]
    assert np.array_equal(rows, semisup.balanced(labels, 10, 0))
    assert not np.array_equal(rows, semisup.balanced(labels, 10, 1))
    held, rest = semisup.split(rows, labels, 0.2, 0)
    assert np.bincount(labels[held], minlength=3).tolist() == [6, 2, 0]
    assert np.array_equal(np.union1d(held, rest), rows) and len(held) + len(rest) == len(rows)
    assert len(semisup.split(rows, labels, 0, 0)[0]) == 0
    with pytest.raises(
        ValueError, match="--held-out 0.2 of .* labelled images of .* classes is less than one image per class"
    ):
        semisup.split(rows[:1], labels, 0.2, 0)


def test_subsets_are_read_from_rows_or_names(files, tmp_path):
    loader = evaluation(files[0])

    def write(name, lines):
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        return str(tmp_path / name)

    assert semisup.read_subset(write("rows", ["7", "3", "", "100"]), loader, None).tolist() == [3, 7, 100]
    names = [f"n{i % 3}/n{i % 3}_{i}.JPEG {i % 3}" for i in range(192)]
    simclr = write("simclr", ["n2_5.JPEG", "n0_0.JPEG", "n1_100.JPEG"])
    assert semisup.read_subset(simclr, loader, write("names", names)).tolist() == [0, 5, 100]
    loader.classes = ["n0", "n1", "n2"]
    bare = [name.split()[0] for name in names]
    assert semisup.read_subset(simclr, loader, write("bare", bare)).tolist() == [0, 5, 100]
    for subset, known, text in [
        (["3", "192"], None, "has row 192: .* has rows 0 to 191"),
        (["3", "3"], None, "has 1 images twice: remove the repetitions"),
        (["n0_0.JPEG"], None, "which a .beton does not: give --names"),
        (["n0_1.JPEG"], names, "1 names of .* are not in .*, such as 'n0_1.JPEG'"),
        (["n0_0.JPEG"], names[:-1], "has 191 names and .* 192 images"),
        (["n0_0.JPEG"], names[1:] + names[:1], "line 1: n1/n1_1.JPEG has class 1, but row 0 of .* has class 0"),
        (["n0_0.JPEG"], bare[1:] + bare[:1], "line 1: n1/n1_1.JPEG has class 1"),
        (["n0_0.JPEG"], ["a/x.jpg"] * 192, "191 file names in several folders"),
        ([""], None, "lists no image"),
    ]:
        with pytest.raises(ValueError, match=text):
            semisup.read_subset(write("a", subset), loader, known and write("b", known))


def test_the_results_are_the_best_cells_on_test_and_held_out_images():
    cells = [
        {"lr": 0.1, "head_mult": 1.0, "top1": 50.0, "top5": 80.0, "held_out_top1": 60.0},
        {"lr": 0.1, "head_mult": 10.0, "top1": 55.0, "top5": 70.0, "held_out_top1": 40.0},
        {"lr": 0.2, "head_mult": 1.0, "top1": 55.0, "top5": 90.0, "held_out_top1": 60.0},
    ]
    published, clean = semisup.results(cells)
    assert published == {"selected_on": "test", "lr": 0.1, "head_mult": 10.0, "top1": 55.0, "top5": 70.0}
    assert clean == {"selected_on": "held-out", "lr": 0.1, "head_mult": 1.0, "top1": 50.0, "top5": 80.0}


def test_the_published_settings():
    parser = argparse.ArgumentParser()
    options.add_protocol_options(parser, "semisup")
    args = parser.parse_args([])
    assert semisup.RATES == (0.001, 0.01, 0.1) and semisup.HEAD_MULTS == (1, 10, 100)
    assert (args.train_batch, args.epochs, args.milestones, args.gamma) == (256, 20, (12, 16), 0.2)
    assert semisup.WEIGHT_DECAY == {1: 5e-4, 10: 1e-4}
    assert finetuning.training_view(View(224, crop="center", resize=256)) == views.supervised(224)[0]
    assert finetuning.training_view(replace(VIEW, mean=(0, 0, 0))).mean == (0, 0, 0)
    other = finetune.optim_config(Linear(), finetune.OTHER | {"clip": 0.0}, "fp32")  # SimCLR, appendix B.5
    assert (other.name, other.nesterov, other.momentum, other.weight_decay) == ("sgd", True, 0.9, 0.0)
    assert other.lr * other.batch / other.base_batch == 0.05 and not other.paramwise
    for n, of, decay in ((12811, 1281167, 5e-4), (128116, 1281167, 1e-4)):  # SimCLR's lists
        assert semisup.WEIGHT_DECAY[round(100 * n / of, 1)] == decay


def test_semisup_prints_progress_and_continues_after_a_stop(files, tmp_path, capsys, monkeypatch):
    """Stopped in its third training of four, it trains two more; another seed trains all again."""
    out, done = tmp_path / "a.json", []
    argv = [
        "--percent",
        50,
        "--weight-decay",
        1e-4,
        "--train-batch",
        24,
        "--epochs",
        1,
        "--lr",
        "0.01,0.1",
        "--head-mult",
        1,
        "--out",
        out,
    ]
    train = finetuning.train

    def counted(*given, **options):
        done.append(1)
        if len(done) == 3:
            raise KeyboardInterrupt
        return train(*given, **options)

    assert call(files, "semisup", *argv[:-2], "--out", tmp_path / "whole.json") == 0, capsys.readouterr().err
    monkeypatch.setattr(finetuning, "train", counted)
    with pytest.raises(KeyboardInterrupt):
        call(files, "semisup", *argv)
    printed = capsys.readouterr().out
    assert "training 2 of 4, lr=0.01 head_mult=1 tested on held-out images, epoch 1/1: loss" in printed
    assert not out.exists() and (tmp_path / "a.part.jsonl").exists()
    with open(tmp_path / "a.part.jsonl", "a") as f:
        f.write('{"name": "lr=0.1 head_')  # a kill in mid-line
    assert call(files, "semisup", *argv) == 0
    assert len(done) == 5 and f"2 of 4 trainings are read from {tmp_path / 'a.part.jsonl'}" in capsys.readouterr().out
    results = [json.loads((tmp_path / name).read_text())["selection"] for name in ("a.json", "whole.json")]
    assert results[0] == results[1] and not list(tmp_path.glob("*.jsonl"))
    (tmp_path / "a.part.jsonl").write_text('{"key": "another"}\n')
    assert call(files, "semisup", *argv) == 0 and len(done) == 9
    assert "is of other settings, data or weights: starting over" in capsys.readouterr().out


def test_semisup_learns_from_a_quarter_of_the_labels(files, tmp_path, capsys):
    """A frozen backbone (rate 1e-9) with the same head learns less: the stripes' direction must be learned."""
    out = tmp_path / "a.json"
    argv = [
        "--percent",
        50,
        "--weight-decay",
        1e-4,
        "--train-batch",
        24,
        "--epochs",
        16,
        "--milestones",
        "10,14",
        "--out",
        out,
    ]
    assert call(files, "semisup", *argv, "--lr", "1e-9,0.1", "--head-mult", 1) == 0, capsys.readouterr().err
    result = json.loads(out.read_text())
    frozen, trained = result["selection"]
    assert trained["top1"] > max(70, frozen["top1"] + 15), result["selection"]
    assert trained["held_out_top1"] > 50
    assert [row["selected_on"] for row in result["results"]] == ["test", "held-out"]
    assert {row["lr"] for row in result["results"]} == {0.1} and set(trained) == set(frozen)
    assert result["options"]["labelled"] == 96 and result["options"]["held_out"] == 18
    assert "selected_on=held-out" in capsys.readouterr().out
