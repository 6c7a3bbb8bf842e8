"""Fine-tuning: rates and updates against hand-computed ones, and the command on images that a network must learn to
see (directions of stripes)."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import write_beton
from sklearn.metrics import accuracy_score, top_k_accuracy_score
from stripes import (
    SPEC,
    VIEW,
    Linear,
    call,
    evaluation,
    files_fixture,  # noqa: F401
    stripes,
    training,
)
from torch import nn

import fastssl.eval
from fastssl import backbones, optim
from fastssl.config import Backbone, Optim
from fastssl.eval import finetune
from fastssl.eval.common import finetuning
from fastssl.kernels.augment import View
from fastssl.sampler import permutation


def test_training_equals_sgd_written_by_hand(files):
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
                Linear(),
                training(files[0], 32, micro_per_step=micro),
                VIEW,
                Optim(batch=32, epochs=1, lr=0.01),
                classes=3,
            )
        )
    for a, b in zip(nets[0].parameters(), nets[1].parameters()):
        torch.testing.assert_close(a, b)


def test_bf16_with_mixup_and_cutmix_and_fp16_train(files, capsys):
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


def test_accuracy_equals_sklearns(files):
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
def test_layer_decay_equals_maes(decay):
    net = backbones.build(Backbone("test_vit"))
    model = finetuning.Classifier(net, 7)
    chosen = {**finetune.TRANSFORMER, "layer_decay": decay}
    settings = finetune.optim_config(net, {**chosen, "clip": 0.0}, "fp32")
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


def test_drop_path_equals_timms():
    import timm

    net = backbones.build(Backbone("test_vit"))
    finetuning.drop_path_(net, 0.3)
    theirs = timm.create_model("test_vit", num_classes=0, drop_path_rate=0.3)
    rate = lambda m: getattr(m, "drop_prob", 0.0)  # noqa: E731
    for a, b in zip(net.body.blocks, theirs.blocks):
        assert rate(a.drop_path1) == pytest.approx(rate(b.drop_path1)) == pytest.approx(rate(a.drop_path2))
    assert rate(net.body.blocks[-1].drop_path1) == pytest.approx(0.3)
    for function in (finetuning.drop_path_, finetuning.layer_decay):
        with pytest.raises(ValueError, match="needs a timm transformer"):
            function(backbones.build(SPEC), 0.5)


def test_finetune_reaches_high_accuracy(files, tmp_path, capsys):
    out = tmp_path / "a.json"
    argv = ["--train-batch", 32, "--epochs", 6, "--lr", 0.8, "--out", out]
    assert call(files, "finetune", *argv) == 0, capsys.readouterr().err
    result = json.loads(out.read_text())
    assert result["results"][0]["top1"] > 80 and result["options"]["optimizer"] == "sgd"


def test_finetune_trains_a_transformer(files, tmp_path, capsys):
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
        (
            ["semisup", "--percent", 3, "--train-batch", 32],
            "a weight decay is published only for 1 % and 10 %: give --weight-decay",
        ),
        (["semisup", "--percent", 0], "--percent 0.0 must be above 0"),
        (["semisup", "--percent", 1, "--subset", "x"], "give one of them"),
        (["semisup", "--names", "x"], "--names needs a --subset FILE that holds names: give both"),
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
def test_wrong_arguments_raise(files, capsys, argv, text):
    assert call(files, *argv) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err and re.search(text, err), err


def test_files_without_one_class_per_image_are_refused(files, tmp_path):
    rng = np.random.default_rng(0)
    images = [stripes(rng, 0) for _ in range(4)]
    unlabelled = write_beton(tmp_path / "none.beton", images, [-1] * 4)
    multi = write_beton(tmp_path / "multi.beton", images, [np.ones(3, np.float32)] * 4)
    load = lambda path: training(path, 4, shuffle=False, drop_last=False)  # noqa: E731
    for path, text in ((unlabelled, "has 4 images without label"), (multi, "has several labels an image")):
        with pytest.raises(ValueError, match=text):
            finetuning.class_labels(load(path))
