"""Each tool reads its exports, with equal outputs; every name of a detectron2 export is checked."""

import dataclasses
import hashlib
import io
import json
import os
import pickle
import pickletools

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

from fastssl import backbones, config, views, weights
from fastssl.checkpoint import disk
from fastssl.config import Backbone
from fastssl.methods import byol
from fastssl.weights import export
from fastssl.weights.export import to_detectron2


def build(seed=0, **spec):
    torch.manual_seed(seed)
    net = backbones.build(Backbone(**spec)).eval()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 2)
    return net


def loaded(recipe):
    scope = {}
    exec(recipe, scope)
    return scope["net"].eval()


def assert_same(theirs, ours, size=64, channels=3):
    x = torch.randn(2, channels, size, size, dtype=torch.double)
    with torch.no_grad():
        torch.testing.assert_close(theirs.double()(x), ours.double()(x), rtol=0, atol=1e-6)


TIMM = [
    {"name": "resnet18"},
    {"name": "resnet50"},
    {"name": "resnet18", "stem": "cifar"},
    {"name": "resnet18", "stem": "cifar_pad2"},
    {"name": "resnet50", "norm": "gn"},
    {"name": "resnet18", "norm": "gn", "in_channels": 2},
    {"name": "resnet18", "norm": "frozen"},
    {"name": "vit_tiny_patch16_224"},
    {"name": "resnet18", "stem": "cifar_norelu"},
    {"name": "vit_tiny_patch16_224", "options": {"num_heads": 12, "reg_tokens": 2}},
]


def size_of(spec):
    return 224 if "vit" in spec["name"] else 32


@pytest.mark.parametrize("spec", TIMM)
def test_timm_loads_the_export(spec, tmp_path):
    net = backbones.channels_last_(build(**spec))
    theirs = loaded(export.write(net, tmp_path / "a.pth", "timm"))
    assert type(theirs).__module__.startswith("timm.")
    assert_same(theirs, net, size_of(spec), spec.get("in_channels", 3))


@pytest.mark.parametrize("spec", [spec for spec in TIMM if "stem" not in spec])
def test_timm_loads_the_hugging_face_folder(spec, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    net = build(**spec)
    theirs = loaded(export.write(net, tmp_path / "hf", "huggingface"))
    assert_same(theirs, net, size_of(spec), spec.get("in_channels", 3))
    assert sorted(os.listdir(tmp_path / "hf")) == ["README.md", "config.json", "model.safetensors"]
    exported = "bn" if net.spec.norm == "frozen" else net.spec.norm
    assert weights.spec_of(tmp_path / "hf" / "model.safetensors") == dataclasses.replace(net.spec, norm=exported)


THIN = [
    {"name": "resnet10"},
    {"name": "resnet10", "width": 8},
    {"name": "resnet18", "width": 16, "norm": "gn"},
    {"name": "resnet50", "width": 16, "stem": "cifar", "in_channels": 2},
    {"name": "resnet10", "stem": "cifar_norelu"},
    {"name": "resnet10", "width": 8, "norm": "gn", "stem": "cifar_pad2"},
]


@pytest.mark.parametrize("spec", THIN)
@pytest.mark.parametrize("to", ["torchvision", "safetensors"])
def test_the_printed_code_builds_a_thin_resnet(spec, to, tmp_path):
    net = build(**spec)
    theirs = loaded(export.write(net, tmp_path / f"a.{to}", to))
    if to == "torchvision":
        assert type(theirs) is torchvision.models.ResNet
    assert_same(theirs, net, 32, spec.get("in_channels", 3))


def run_of(size, backbone, **optim):
    run = config.Run(
        method=byol.Config(),
        backbone=Backbone(**backbone),
        name="r",
        optim=config.Optim(**optim),
        data=config.Data(train="x/y.beton", views=views.byol(size)),
    )
    return json.loads(json.dumps(config.dump(run)))


@pytest.mark.parametrize("to", ["timm", "huggingface"])
def test_a_vision_transformer_runs_at_its_training_size(to, tmp_path, monkeypatch):
    """Trained at 64 pixels with timm's table for 224: the printed code takes 64 pixels and computes the same."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    spec = {"name": "vit_tiny_patch16_224", "options": {"depth": 2}}
    net = build(**spec)
    recipe = export.write(net, tmp_path / "a", to, run=run_of(64, spec))
    theirs = loaded(recipe)
    assert_same(theirs, net, 64)
    assert theirs(torch.zeros(1, 3, 96, 96, dtype=torch.double)).shape == (1, 192), "and other sizes"
    assert "mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)" in recipe and "64 x 64" in recipe
    if to == "huggingface":
        settings = json.loads((tmp_path / "a" / "config.json").read_text())
        assert settings["pretrained_cfg"]["input_size"] == [3, 64, 64] and settings["model_args"]["img_size"] == 64
        again = backbones.build(weights.spec_of(tmp_path / "a" / "model.safetensors"))
        weights.load_backbone(tmp_path / "a" / "model.safetensors", again)
        assert_same(again.eval(), net, 64)


def test_a_vision_transformer_with_a_fixed_size_is_exported_with_it(tmp_path):
    spec = {"name": "vit_tiny_patch16_224", "options": {"depth": 2, "img_size": 48, "num_heads": 12}}
    net = build(**spec)
    for run in (None, run_of(48, spec)):
        assert_same(loaded(export.write(net, tmp_path / "a.pth", run=run)), net, 48)
    assert_same(loaded(export.write(net, tmp_path / "a.safetensors", "safetensors")), net, 48)


def test_the_model_card_has_the_number_of_steps(tmp_path):
    net = build(name="resnet18")
    export.write(net, tmp_path / "a", "huggingface", run=run_of(64, {"name": "resnet18"}, steps=10), steps=7)
    text = (tmp_path / "a" / "README.md").read_text()
    assert "| optim.steps | 10 |" in text and "| steps made | 7 |" in text and "epochs" not in text
    assert "| image size | 64 |" in text


def detectron2_resnet50():
    """The names of the tensors of detectron2's ResNet-50, from its structure."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    convs = ["stem.conv1"]
    for stage, blocks in zip((2, 3, 4, 5), (3, 4, 6, 3)):
        for block in range(blocks):
            convs += [f"res{stage}.{block}.conv{i}" for i in (1, 2, 3)]
            convs += [f"res{stage}.{block}.shortcut"] if block == 0 else []
    return {f"{c}.weight" for c in convs} | {f"{c}.norm.{n}" for c in convs for n in norm}


def test_detectron2_names_of_resnet50_one_by_one():
    with torch.device("meta"):
        ours = torchvision.models.resnet50().state_dict()
    names = to_detectron2.detectron2_names([key for key in ours if not key.startswith("fc.")])
    assert set(names.values()) == detectron2_resnet50() and len(set(names.values())) == len(names)
    for old, new in names.items():  # independently of the rules: the same place in the network
        *at, leaf = old.split(".")
        if at[0].startswith("layer"):
            stage, block, module = f"res{int(at[0][5]) + 1}", at[1], at[2]
            if module == "downsample":
                module = "shortcut" if at[3] == "0" else "shortcut.norm"
            elif module.startswith("bn"):
                module = f"conv{module[2]}.norm"
            assert new == f"{stage}.{block}.{module}.{leaf}"
        else:
            assert new == f"stem.{'conv1' if at[0] == 'conv1' else 'conv1.norm'}.{leaf}"


def test_the_detectron2_file_has_arrays_under_detectron2s_names(tmp_path):
    net = build(name="resnet18")
    recipe = export.write(net, tmp_path / "a.pkl", "detectron2")
    data = (tmp_path / "a.pkl").read_bytes()
    content = pickle.loads(data)
    assert content["__author__"] == "fastssl" and content["matching_heuristics"] is True
    state, model = net.state_dict(), content["model"]
    assert len(model) == len(state) and all(type(v) is np.ndarray and v.flags.writeable for v in model.values())
    assert torch.equal(torch.from_numpy(model["res3.0.shortcut.norm.bias"]), state["layer2.0.downsample.1.bias"])
    assert model["stem.conv1.norm.num_batches_tracked"].dtype == np.int64
    strings = [arg for _, arg, _ in pickletools.genops(io.BytesIO(data)) if isinstance(arg, str)]
    assert "numpy" in strings and not [s for s in strings if s.startswith("numpy.")], "numpy 2's private names"
    for line in (
        "STRIDE_IN_1X1: False",
        "DEPTH: 18",
        'FORMAT: "RGB"',
        "RES2_OUT_CHANNELS: 64",
        "PIXEL_MEAN: [123.675, 116.28, 103.53]",
    ):
        assert line in recipe


@pytest.mark.parametrize(
    "spec, to, text",
    [
        ({"name": "resnet10"}, "timm", "timm has no resnet10"),
        ({"name": "resnet18", "sobel": True}, "torchvision", "Sobel"),
        ({"name": "resnet18", "sobel": True}, "timm", "Sobel"),
        ({"name": "resnet18", "sobel": True}, "detectron2", "Sobel"),
        ({"name": "resnet18", "sobel": True}, "huggingface", "Sobel"),
        ({"name": "resnet18", "width": 8}, "timm", "timm has no resnet18 of width 8: export with --to torchvision"),
        ({"name": "vit_tiny_patch16_224"}, "torchvision", "no vit_tiny_patch16_224: export with --to timm"),
        ({"name": "resnet18", "stem": "cifar"}, "huggingface", "no resnet18 with stem='cifar'"),
        ({"name": "resnet18", "stem": "cifar"}, "detectron2", "detectron2 has no resnet18 with stem='cifar'"),
        ({"name": "resnet10"}, "detectron2", "detectron2 has no resnet10"),
        ({"name": "wide_resnet50_2"}, "detectron2", "detectron2 has no wide_resnet50_2"),
        (
            {"name": "vit_tiny_patch16_224"},
            "detectron2",
            "detectron2 has no vit_tiny_patch16_224 .*export with --to timm",
        ),
    ],
)
def test_networks_that_a_tool_lacks_are_refused(spec, to, text, tmp_path):
    net = build(**spec)
    with pytest.raises(ValueError, match=text):
        export.write(net, tmp_path / "a", to)
    assert os.listdir(tmp_path) == []


@pytest.fixture
def run_folder(tmp_path):
    """A run of BYOL with one checkpoint: a student and its moving average."""
    spec = Backbone("resnet18", stem="imagenet")
    run = config.Run(
        method=byol.Config(),
        backbone=spec,
        data=config.Data(train="x/y.beton", views=views.byol(64)),
        optim=config.Optim(lr=0.25),
        name="r",
    )
    folder = tmp_path / "run"
    temporary = disk.create(folder, 1)
    student, teacher = build(0, name="resnet18"), build(1, name="resnet18")
    state = {f"backbone.{k}": v for k, v in student.state_dict().items()}
    state |= {f"target.0.{k}": v for k, v in teacher.state_dict().items()}
    safetensors.torch.save_file(state, temporary / "weights.safetensors")
    disk.commit(temporary, keep=1)
    (folder / "config.json").write_text(json.dumps(config.dump(run)))
    return folder, student, teacher


@pytest.mark.parametrize("which", [None, "student", "teacher"])
def test_command_exports_student_or_teacher(run_folder, which, capsys):
    folder, student, teacher = run_folder
    argv = [str(folder), "--to", "timm", *(["--which", which] if which else [])]
    assert export.main(argv) == 0
    out = capsys.readouterr().out
    theirs = loaded(out[out.index("import timm") :])
    assert_same(theirs, teacher if which == "teacher" else student)


def test_command_writes_a_card_of_the_run(run_folder, capsys):
    folder, *_ = run_folder
    assert export.main([str(folder), "--to", "huggingface"]) == 0
    text = (folder / "huggingface" / "README.md").read_text()
    assert "| method | byol |" in text and "| optim.lr | 0.25 |" in text and "| data | y.beton |" in text
    assert hashlib.sha256((folder / "huggingface" / "model.safetensors").read_bytes()).hexdigest() in text
    assert "| steps made | 1 |" in text
    assert str(folder) not in text, "a path of this machine is nobody else's business"
    settings = json.loads((folder / "huggingface" / "config.json").read_text())
    assert settings["architecture"] == "resnet18" and settings["pretrained_cfg"]["input_size"] == [3, 64, 64]


def test_command_exports_weights_of_another_project(tmp_path, capsys):
    net = build(name="resnet18", stem="cifar")
    torch.save({"state_dict": {f"module.encoder_q.{k}": v for k, v in net.state_dict().items()}}, tmp_path / "moco.pth")
    argv = [str(tmp_path / "moco.pth"), "--backbone", "resnet18", "--stem", "cifar"]
    assert export.main(argv) == 0
    out = capsys.readouterr().out
    theirs = loaded(out[out.index("import torch") :])
    theirs.fc = nn.Identity()
    assert_same(theirs, net, 32)


def test_command_exports_a_sobel_network_of_another_project(tmp_path, capsys):
    net = build(name="resnet10", width=8, sobel=True)
    state = {f"backbone.{k}": v for k, v in net.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "deepcluster.pth")
    argv = [str(tmp_path / "deepcluster.pth"), "--to", "safetensors", "--backbone", "resnet10", "--width", "8"]
    assert export.main([*argv, "--in-channels", "3"]) == 2
    assert "backbone.sobel" in capsys.readouterr().err
    for given in ([], ["--sobel"]):  # the first convolution's two channels say so
        assert export.main([*argv, *given]) == 0
        assert weights.spec_of(tmp_path / "backbone.safetensors") == net.spec


@pytest.mark.parametrize(
    "argv, text",
    [
        (["--backbone", "resnet18"], "names its backbone"),
        (["--stem", "cifar"], "names its backbone"),
        (["--which", "teacher", "--prefix", "target.0"], "both choose"),
    ],
)
def test_the_export_command_refuses_wrong_arguments(run_folder, argv, text, capsys):
    assert export.main([str(run_folder[0]), *argv]) == 2
    assert text in capsys.readouterr().err
