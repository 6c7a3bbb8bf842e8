"""Checkpoints in the layouts of other projects give the features that the project's own network computes."""

import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from fastssl import backbones, weights
from fastssl.config import Backbone
from fastssl.weights import export, foreign, source

sys.path.insert(0, str(Path(__file__).parent))
import peer_networks as peers
from foreign_layouts import LAYOUTS, keys, under


@pytest.fixture(scope="module")
def nets():
    """Per kind: the network to find, and another that must not be found."""
    return {kind: (peers.make(kind, 0), peers.make(kind, 1)) for kind in peers.KINDS}


def ours(kind, **changes):
    torch.manual_seed(2)
    return backbones.build(Backbone(**{**peers.KINDS[kind][1], **changes})).eval()


@pytest.mark.parametrize("project", LAYOUTS)
def test_layout_is_recognised_and_gives_the_features_of_its_project(project, nets, tmp_path):
    kind, make, prefix = LAYOUTS[project]
    net, other = nets[kind]
    torch.save(make(net, other), tmp_path / "a.pth")
    mine = ours(kind)
    report = weights.load_backbone(tmp_path / "a.pth", mine)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(mine(x), net(x), rtol=1e-5, atol=2e-5)
        assert not torch.allclose(other(x), net(x), atol=1e-2)
    assert report.prefix == prefix
    assert report.loaded >= len([k for k in keys(net) if "num_batches" not in k])
    assert repr(prefix) in str(report) or prefix == ""


@pytest.mark.parametrize("project", ["MMSelfSup MAE, extracted", "lightly, numbered", "MoCo"])
@pytest.mark.parametrize("key", ["first", "last"])
def test_one_missing_tensor_is_an_error_in_every_layout(project, key, nets, tmp_path):
    kind, make, _ = LAYOUTS[project]
    net, other = nets[kind]
    checkpoint = make(net, other)
    state = checkpoint["state_dict"]
    mine = [
        k
        for k in state
        if "encoder_k" not in k
        and "momentum" not in k
        and not k.endswith("num_batches_tracked")
        and ".fc." not in k
        and "head" not in k
        and "queue" not in k
    ]
    for k in list(state):  # the other copy would be found instead
        if k not in mine or k == mine[0 if key == "first" else -1]:
            del state[k]
    torch.save(checkpoint, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="1 of the backbone's"):
        weights.load_backbone(tmp_path / "a.pth", ours(kind))


@pytest.mark.parametrize(
    "project, which, prefix",
    [
        ("DINO", "student", "student.module.backbone."),
        ("DINO", "teacher", "teacher.backbone."),
        ("MoCo", "student", "state_dict.module.encoder_q."),
        ("MoCo", "teacher", "state_dict.module.encoder_k."),
        ("lightly DINO", "student", "state_dict.student_backbone."),
        ("solo-learn", "teacher", "state_dict.momentum_backbone."),
        ("timm", "teacher", "state_dict_ema."),
        ("PyTorch-BYOL (sthalles)", "teacher", "target_network_state_dict.encoder."),
    ],
)
def test_which_chooses_student_or_teacher(project, which, prefix, nets, tmp_path):
    kind, make, default = LAYOUTS[project]
    net, other = nets[kind]
    torch.save(make(net, other), tmp_path / "a.pth")
    mine, x = ours(kind), torch.randn(2, 3, 32, 32)
    assert weights.load_backbone(tmp_path / "a.pth", mine, which=which).prefix == prefix
    with torch.no_grad():
        torch.testing.assert_close(mine(x), (net if prefix == default else other)(x), rtol=1e-5, atol=2e-5)


def test_the_error_names_weights_that_cannot_be_downloaded(monkeypatch, tmp_path):
    def offline(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(OSError, match="weights of resnet18 from torchvision cannot be downloaded .*Name or service"):
        weights.load_backbone("torchvision", backbones.build(Backbone("resnet18")))


def test_a_single_copy_has_no_teacher(nets, tmp_path):
    net, other = nets["resnet"][0], ours("resnet")
    torch.save(under("backbone.", net), tmp_path / "a.pth")
    with pytest.raises(ValueError, match="has no teacher that is known as such, only 'backbone.': leave out --which"):
        weights.load_backbone(tmp_path / "a.pth", other, which="teacher")
    with pytest.raises(ValueError, match="both choose a copy"):
        weights.load_backbone(tmp_path / "a.pth", other, which="teacher", prefix="backbone.")


def test_a_given_prefix_refers_to_the_files_keys(nets, tmp_path):
    net, other = nets["numbered"]
    torch.save(LAYOUTS["lightly, numbered"][1](net, other), tmp_path / "a.pth")
    mine = ours("numbered")
    report = weights.load_backbone(tmp_path / "a.pth", mine, prefix="state_dict.backbone_momentum")
    assert report.layout == "numbered children"
    assert torch.equal(mine.layer4[0].conv2.weight, keys(other)["7.0.conv2.weight"])


def test_safetensors_of_other_projects_load(nets, tmp_path):
    net, _ = nets["mmlab vit"]
    state = {k: v.contiguous() for k, v in under("backbone.", net).items()}
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    mine, x = ours("mmlab vit"), torch.randn(2, 3, 32, 32)
    assert weights.load_backbone(tmp_path / "a.safetensors", mine).layout == "OpenMMLab ViT"
    with torch.no_grad():
        torch.testing.assert_close(mine(x), net(x), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    "meta, text",
    [
        ({"config": "backbone=dict(type='ResNet', style='caffe')"}, "strides in the 1x1"),
        ({"cfg": "conv_cfg=dict(type='ConvWS')"}, "standardise their weights"),
    ],
)
def test_networks_with_equal_keys_and_another_function_are_refused(meta, text, nets, tmp_path):
    net, other = nets["resnet"][0], ours("resnet")
    torch.save({"meta": meta, "state_dict": keys(net)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=text):
        weights.load_backbone(tmp_path / "a.pth", other)


@pytest.mark.parametrize(
    "project, kind, text",
    [
        ("MoCo v3", "vit", "12 heads.* has 3, .*num_heads=12 or num_heads=3"),
        ("MMSelfSup MoCo v3, ViT-S", "mmlab vit", "num_heads=12"),
        ("solo-learn MoCo v3, ViT-Ti", "vit", "num_heads=12"),
        ("lightly, its own ResNet numbered", "numbered", "ReLU after the stem's norm.*--stem cifar_norelu"),
    ],
)
def test_vits_of_other_projects_are_refused_without_num_heads(project, kind, text, nets, tmp_path):
    """With the options of the layouts above, outputs equal those of the authors' networks."""
    right, make, _ = LAYOUTS[project]
    torch.save(make(*nets[right]), tmp_path / "a.pth")
    mine = ours(kind)
    before = {k: v.clone() for k, v in keys(mine).items()}
    with pytest.raises(ValueError, match=text):
        weights.load_backbone(tmp_path / "a.pth", mine)
    assert all(torch.equal(v, before[k]) for k, v in keys(mine).items())
    if "vit" in kind:  # whoever says which it is has the say
        stated = ours(kind, options={**peers.VIT["options"], "num_heads": 3})
        weights.load_backbone(tmp_path / "a.pth", stated)


def test_moco_v3_is_exported_with_its_number_of_heads(nets, tmp_path, capsys):
    """The code that the command prints gives the outputs of the authors' network."""
    net, other = nets["mocov3"]
    torch.save(LAYOUTS["MoCo v3"][1](net, other), tmp_path / "vit-s.pth")
    argv = [
        str(tmp_path / "vit-s.pth"),
        "--to",
        "timm",
        "--backbone",
        "vit_tiny_patch16_224",
        "--option",
        "depth=2",
        "--option",
        "img_size=32",
    ]
    assert export.main(argv) == 2
    assert "--option num_heads=12" in capsys.readouterr().err
    assert export.main([*argv, "--option", "num_heads=12"]) == 0
    out, scope = capsys.readouterr().out, {}
    exec(out[out.index("import timm") :], scope)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(scope["net"].eval()(x), net(x), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    "here, text",
    [
        ({"options": {**peers.VIT["options"], "num_heads": 12}}, r"options.num_heads is None there, 12 here"),
        ({"options": {**peers.VIT["options"], "act_layer": "relu"}}, r"options.act_layer is None there, 'relu' here"),
        ({"options": {**peers.VIT["options"], "drop_path_rate": 0.2, "weight_init": "jax"}}, None),
    ],
)
def test_weights_with_a_description_load_into_that_network_only(here, text, tmp_path):
    """This holds for run folders, too, and for what timm and torchvision download."""
    export.write(ours("vit"), tmp_path / "a.safetensors", "safetensors")
    if text is None:
        weights.load_backbone(tmp_path / "a.safetensors", ours("vit", **here))
        return
    with pytest.raises(ValueError, match=text):
        weights.load_backbone(tmp_path / "a.safetensors", ours("vit", **here))


def test_another_stem_of_equal_shape_is_refused(tmp_path):
    export.write(ours("resnet"), tmp_path / "a.safetensors", "safetensors")
    with pytest.raises(ValueError, match="backbone.stem is 'cifar' there, 'cifar_pad2' here"):
        weights.load_backbone(tmp_path / "a.safetensors", ours("resnet pad 2"))


def test_every_layout_is_covered_by_a_checkpoint_above(nets):
    shown = set()
    for kind, make, _ in LAYOUTS.values():
        flat = source.flatten(make(*nets[kind]), kind)
        shown |= {layout for layout, _ in foreign.matching_layouts(list(flat))}
    assert shown == set(foreign.LAYOUTS)


def test_lightlys_own_network_gives_the_same_features(tmp_path):
    """With the classes of the package, where it is installed, instead of those in peer_networks.py."""
    models = pytest.importorskip("lightly.models")
    net = models.ResNetGenerator("resnet-9", width=0.125).eval()
    net = nn.Sequential(*list(net.children())[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten())
    torch.save({"state_dict": under("backbone.", net)}, tmp_path / "a.pth")
    mine, x = ours("lightly numbered"), torch.randn(2, 3, 32, 32)
    weights.load_backbone(tmp_path / "a.pth", mine)
    with torch.no_grad():
        torch.testing.assert_close(mine(x), net(x), rtol=1e-5, atol=2e-5)
