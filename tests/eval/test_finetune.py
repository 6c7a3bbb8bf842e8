"""Fine-tuning: rates and updates against hand-computed ones, subsets, ranks, and the commands on images that a network
must learn to see (directions of stripes)."""

import argparse
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import write_beton
from sklearn.metrics import accuracy_score, top_k_accuracy_score
from torch import nn

import fastssl.eval
from fastssl import backbones, optim, views
from fastssl.config import Backbone, Optim
from fastssl.eval import finetune, semisup
from fastssl.eval.common import finetuning
from fastssl.kernels.augment import View
from fastssl.loader import Loader, permutation

SPEC = Backbone("resnet10", stem="cifar", width=8)
VIEW = View(16, crop="center")
NET = ["--backbone", "resnet10", "--stem", "cifar", "--width", 8, "--size", 16, "--features", "untrained"]


def stripes(rng, direction, side=16):
    """uint8 image: stripes of random phase and colour, vertical, horizontal or diagonal (either way), in noise."""
    y, x = np.mgrid[:side, :side]
    along = (x, y, x + rng.choice((-1, 1)) * y)[direction]
    wave = np.sin(2 * np.pi * (along / 4 + rng.random()))[..., None] * rng.uniform(-70, 70, 3)
    return np.clip(128 + wave + rng.normal(0, 30, (side, side, 3)), 0, 255).astype(np.uint8)


def make(path, n, seed):
    rng = np.random.default_rng(seed)
    return str(write_beton(path, [stripes(rng, i % 3) for i in range(n)], [i % 3 for i in range(n)]))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stripes")
    return make(folder / "train.beton", 192, 0), make(folder / "test.beton", 90, 1)


def training(path, batch, **options):
    return Loader(path, batch, device="cpu", workers=1, **options)


def evaluation(path):
    return training(path, 64, shuffle=False, drop_last=False)


class Linear(nn.Module):
    """A backbone whose gradient can be written down."""

    def __init__(self, dim=5):
        super().__init__()
        self.dim, self.layer = dim, nn.Linear(3 * 16 * 16, dim, bias=False)

    def forward(self, x):
        return self.layer(x.flatten(1))


def test_training_is_sgd_written_out(files):
    """Two epochs over a subset that is not a multiple of the batch, two rates, a step of the schedule, in algebra."""
    torch.manual_seed(0)
    net, rows = Linear(), np.arange(3, 90)
    settings = Optim(batch=32, epochs=2, weight_decay=0.1, schedule="step", milestones=(1.0,), gamma=0.2)
    settings = finetuning.with_head_rate(settings, 0.02, 10.0)
    loader = training(files[0], 32)
    options = finetuning.TrainingOptions(seed=4, smoothing=0.1)
    model = finetuning.train(net, loader, VIEW, settings, classes=3, rows=rows, options=options)

    batch = next(training(files[0], 192, shuffle=False, drop_last=False).epoch(0))
    x = batch.pixels.view(-1, 16, 16, 3).permute(0, 3, 1, 2).double() / 255
    x = ((x - torch.tensor(VIEW.mean).view(3, 1, 1)) / torch.tensor(VIEW.std).view(3, 1, 1)).flatten(1)
    torch.manual_seed(4)
    head = nn.Linear(5, 3)
    nn.init.normal_(head.weight, std=0.01)
    w = {
        "backbone.layer.weight": net.layer.weight.detach().double(),
        "head.weight": head.weight.detach().double(),
        "head.bias": torch.zeros(3).double(),
    }
    v = {name: torch.zeros_like(value) for name, value in w.items()}
    for epoch in range(2):
        order = np.resize(rows[permutation(len(rows), 4, epoch)], 96)
        for some in order.reshape(3, 32):
            features = x[some] @ w["backbone.layer.weight"].T
            p = (features @ w["head.weight"].T + w["head.bias"]).softmax(1)
            target = torch.full_like(p, 0.1 / 3)
            target[torch.arange(32), batch.label[some]] += 0.9
            d = (p - target) / 32
            grad = {
                "backbone.layer.weight": (d @ w["head.weight"]).T @ x[some],
                "head.weight": d.T @ features,
                "head.bias": d.sum(0),
            }
            for name in w:
                lr = 0.02 * (10 if name.startswith("head") else 1) * (0.2 if epoch else 1)
                v[name] = 0.9 * v[name] + grad[name] + 0.1 * w[name]
                w[name] = w[name] - lr * v[name]
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.detach().double(), w[name], rtol=2e-4, atol=2e-6)
    torch.manual_seed(0)
    assert torch.equal(net.layer.weight, Linear().layer.weight), "the given backbone stays as it was"


def test_micro_batches_change_nothing_without_batch_norm(files):
    nets = []
    for micro in (1, 4):
        torch.manual_seed(0)
        nets.append(
            finetuning.train(
                Linear(), training(files[0], 32, micro=micro), VIEW, Optim(batch=32, epochs=1, lr=0.01), classes=3
            )
        )
    for a, b in zip(nets[0].parameters(), nets[1].parameters()):
        torch.testing.assert_close(a, b)


def test_precisions_and_mixing_train(files, capsys):
    for precision, mix in (("bf16", {"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1}), ("fp16", {})):
        model = finetuning.train(
            Linear(),
            training(files[0], 32),
            VIEW,
            Optim(batch=32, epochs=2, lr=0.01, clip=1.0, precision=precision),
            classes=3,
            options=finetuning.TrainingOptions(**mix),
        )
        losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
        first, last = losses
        assert last < first and all(p.isfinite().all() and p.dtype == torch.float32 for p in model.parameters())


def test_divergence_is_an_error(files):
    with pytest.raises(finetuning.Diverged, match="lower the rate 1e\\+20"):
        finetuning.train(Linear(), training(files[0], 32), VIEW, Optim(batch=32, epochs=3, lr=1e20), classes=3)


def test_accuracy_is_sklearns(files):
    """Six classes of which the file has three; all rows, some rows, and logits that are NaN."""
    torch.manual_seed(0)
    model, loader = finetuning.Classifier(Linear(), 6), evaluation(files[1])
    nn.init.normal_(model.head.weight)
    with torch.no_grad():
        batch = next(training(files[1], 90, shuffle=False, drop_last=False).epoch(0))
        x = finetuning.make_views(batch.pixels, batch.sizes, batch.index, (VIEW,), seed=0, epoch=0)[0]
        scores, y = model(x), batch.label.numpy()
    for rows in (None, np.arange(1, 90, 7), np.arange(64), np.arange(65)):
        chosen = np.arange(90) if rows is None else rows
        ours = finetuning.accuracy(model, loader, VIEW, classes=6, rows=rows)
        assert ours["top1"] == pytest.approx(100 * accuracy_score(y[chosen], scores.argmax(1)[chosen]))
        top5 = top_k_accuracy_score(y[chosen], scores[chosen], k=5, labels=range(6))
        assert ours["top5"] == pytest.approx(100 * top5)
    nn.init.constant_(model.head.bias, float("nan"))
    assert finetuning.accuracy(model, loader, VIEW, classes=6) == {"top1": 0, "top5": 0}


def trained(train, test):
    """State after two epochs of a network with batch norm, and its accuracy on some rows."""
    torch.manual_seed(0)
    model = finetuning.train(
        backbones.build(SPEC),
        training(train, 32),
        View(16, flip=0.5),
        Optim(batch=32, epochs=2, lr=0.02),
        classes=3,
        rows=np.arange(75),
    )
    held = finetuning.accuracy(model, evaluation(test), VIEW, classes=3, rows=np.arange(0, 90, 4))
    return model.state_dict(), held


def mae_layer(name, depth):
    """MAE's util/lr_decay.py: which layer a parameter is of; lr decay^(depth + 1 - layer)."""
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed"):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks") else depth + 1


@pytest.mark.parametrize("decay", [0.65, 1.0])
def test_layer_decay_is_maes(decay):
    net = backbones.build(Backbone("test_vit"))
    model = finetuning.Classifier(net, 7)
    chosen = {**finetune.TRANSFORMER, "layer_decay": decay}
    settings = finetune.settings(net, chosen, 0.0, "fp32")
    made, schedule = optim.build(model.named_parameters(), settings, steps_per_epoch=10)
    names = {p: name for name, p in model.named_parameters()}
    for step, factor in ((0, 0.0), (25, 0.5), (50, 1.0)):  # of 5 epochs of warm-up
        schedule.set_lr(made, step)
        seen = {names[p]: (g["lr"], g["weight_decay"]) for g in made.param_groups for p in g["params"]}
        assert len(seen) == len(names)
        for name, (lr, weight_decay) in seen.items():
            bare = name.removeprefix("backbone.body.")
            want = 5e-4 * 1024 / 256 * decay ** (6 + 1 - mae_layer(bare, 6))
            assert lr == pytest.approx(factor * want), name
            plain = bare in ("cls_token", "pos_embed") or dict(model.named_parameters())[name].ndim == 1
            assert weight_decay == (0.0 if plain else 0.05), name
    schedule.set_lr(made, 1000)
    assert max(g["lr"] for g in made.param_groups) == pytest.approx(1e-6)


def test_blocks_decay_as_in_timm():
    import timm
    from timm.optim import param_groups_layer_decay

    theirs = timm.create_model("test_vit", num_classes=3)
    by = {p: g["lr_scale"] for g in param_groups_layer_decay(theirs, 0.0, layer_decay=0.5) for p in g["params"]}
    ours = finetuning.layer_decay(backbones.build(Backbone("test_vit")), 0.5)
    for name, p in theirs.named_parameters():
        if not name.startswith(("norm", "head")):  # timm counts the last norm to the last block, MAE to the head
            (rate,) = [o["lr_mult"] for pattern, o in ours.items() if re.search(pattern, f"backbone.body.{name}")]
            assert rate == pytest.approx(by[p]), name


def test_drop_path_is_timms():
    import timm

    net = backbones.build(Backbone("test_vit"))
    finetuning.drop_path_(net, 0.3)
    theirs = timm.create_model("test_vit", num_classes=0, drop_path_rate=0.3)
    rate = lambda m: getattr(m, "drop_prob", 0.0)  # noqa: E731
    for a, b in zip(net.body.blocks, theirs.blocks):
        assert rate(a.drop_path1) == pytest.approx(rate(b.drop_path1)) == pytest.approx(rate(a.drop_path2))
    assert rate(net.body.blocks[-1].drop_path1) == pytest.approx(0.3)
    for call in (finetuning.drop_path_, finetuning.layer_decay):
        with pytest.raises(ValueError, match="needs a timm transformer"):
            call(backbones.build(SPEC), 0.5)


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
    with pytest.raises(ValueError, match="leave none to hold out of 0.2"):
        semisup.split(rows[:1], labels, 0.2, 0)


def test_lists_of_rows_and_of_names(files, tmp_path):
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
        (["3", "3"], None, "has 1 images twice"),
        (["n0_0.JPEG"], None, "a .beton has none: give --names"),
        (["n0_1.JPEG"], names, "1 names of .* are not in .*, such as 'n0_1.JPEG'"),
        (["n0_0.JPEG"], names[:-1], "has 191 names and .* 192 images"),
        (["n0_0.JPEG"], names[1:] + names[:1], "line 1: n1/n1_1.JPEG is of class 1, and row 0 of .* of class 0"),
        (["n0_0.JPEG"], bare[1:] + bare[:1], "line 1: n1/n1_1.JPEG is of class 1"),
        (["n0_0.JPEG"], ["a/x.jpg"] * 192, "191 file names twice"),
        ([""], None, "lists no image"),
    ]:
        with pytest.raises(ValueError, match=text):
            semisup.read_subset(write("a", subset), loader, known and write("b", known))


def test_the_best_cells_on_the_test_set_and_on_held_out_images():
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
    semisup.add_options(parser)
    args = parser.parse_args([])
    assert semisup.RATES == (0.001, 0.01, 0.1) and semisup.HEAD_MULTS == (1, 10, 100)
    assert (args.train_batch, args.epochs, args.milestones, args.gamma) == (256, 20, (12, 16), 0.2)
    assert semisup.WEIGHT_DECAY == {1: 5e-4, 10: 1e-4}
    assert finetuning.training_view(View(224, crop="center", resize=256)) == views.supervised(224)[0]
    assert finetuning.training_view(replace(VIEW, mean=(0, 0, 0))).mean == (0, 0, 0)
    other = finetune.settings(Linear(), finetune.OTHER, 0.0, "fp32")  # SimCLR, appendix B.5
    assert (other.name, other.nesterov, other.momentum, other.weight_decay) == ("sgd", True, 0.9, 0.0)
    assert other.lr * other.batch / other.base_batch == 0.05 and not other.paramwise
    for n, of, decay in ((12811, 1281167, 5e-4), (128116, 1281167, 1e-4)):  # SimCLR's lists
        assert semisup.WEIGHT_DECAY[round(100 * n / of, 1)] == decay


def call(files, protocol, *argv):
    argv = [protocol, "--train", files[0], "--test", files[1], *NET, *argv, "--device", "cpu", "--workers", 1]
    try:
        return fastssl.eval.main([str(word) for word in argv])
    except SystemExit as stop:
        return stop.code


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


def test_finetune_learns(files, tmp_path, capsys):
    out = tmp_path / "a.json"
    argv = ["--train-batch", 32, "--epochs", 6, "--lr", 0.8, "--out", out]
    assert call(files, "finetune", *argv) == 0, capsys.readouterr().err
    result = json.loads(out.read_text())
    assert result["results"][0]["top1"] > 80 and result["options"]["optimizer"] == "sgd"


def test_finetune_a_transformer(files, tmp_path, capsys):
    out = tmp_path / "a.json"
    vit = [
        "--train",
        files[0],
        "--test",
        files[1],
        "--backbone",
        "test_vit",
        "--features",
        "untrained",
        "--size",
        32,
        "--train-batch",
        32,
        "--epochs",
        2,
        "--warmup-epochs",
        1,
        "--mixup",
        0.8,
        "--cutmix",
        1.0,
        "--pool",
        "avg",
        "--device",
        "cpu",
        "--workers",
        1,
        "--out",
        out,
    ]
    assert fastssl.eval.main(["finetune", *map(str, vit)]) == 0, capsys.readouterr().err
    options = json.loads(out.read_text())["options"]
    assert (options["optimizer"], options["layer_decay"], options["drop_path"], options["pool"]) == (
        "adamw",
        0.65,
        0.1,
        "avg",
    )


@pytest.mark.parametrize(
    "argv, text",
    [
        (["semisup", "--percent", 3, "--train-batch", 32], "published for 1 % and 10 % alone: give --weight-decay"),
        (["semisup", "--percent", 0], "--percent 0.0 must be above 0"),
        (["semisup", "--percent", 1, "--subset", "x"], "give one of them"),
        (["semisup", "--names", "x"], "in a --subset FILE"),
        (["semisup", "--subset", "missing.txt", "--train-batch", 32], "missing.txt"),
        (["semisup", "--train-batch", 0], "--train-batch 0 must be a positive multiple"),
        (["semisup", "--train-batch", 32, "--micro-batch", 5], "times --micro-batch 5"),
        (["semisup"], "batch=256 is larger than .* .192 samples."),
        (["semisup", "--lr", "0.1,-1"], "must be positive"),
        (["finetune", "--lr", 0], "--lr 0.0 must be positive"),
        (["finetune", "--layer-decay", 0.5, "--train-batch", 32], "layer-wise decay needs a timm transformer"),
        (["finetune", "--pool", "avg", "--train-batch", 32], "--pool needs a timm transformer"),
        (["finetune", "--layer-decay", 1.5], "must be at most 1"),
        (["finetune", "--warmup-epochs", 5, "--epochs", 5], "--warmup-epochs 5 must be less than --epochs 5"),
        (["finetune", "--smoothing", 1], "below 1"),
        (["finetune", "--mixup", 1, "--train-batch", 15], "must be even"),
        (["finetune", "--lr", 1e20, "--train-batch", 32, "--epochs", 2], "lower the rate"),
    ],
    ids=lambda v: " ".join(map(str, v)) if isinstance(v, list) else "",
)
def test_mistakes(files, capsys, argv, text):
    assert call(files, *argv) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err and re.search(text, err), err


def test_files_that_cannot_train_a_classifier(files, tmp_path):
    rng = np.random.default_rng(0)
    images = [stripes(rng, 0) for _ in range(4)]
    unlabelled = write_beton(tmp_path / "none.beton", images, [-1] * 4)
    multi = write_beton(tmp_path / "multi.beton", images, [np.ones(3, np.float32)] * 4)
    load = lambda path: training(path, 4, shuffle=False, drop_last=False)  # noqa: E731
    for path, text in ((unlabelled, "has 4 images without label"), (multi, "has several labels an image")):
        with pytest.raises(ValueError, match=text):
            finetuning.class_labels(load(path))
