"""Checkpoints in the layouts that other projects publish, made here from their key names, give the same features."""

import argparse
import collections

import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

from fastssl import backbones, foreign, weights
from fastssl.config import Backbone

RESNET = {"name": "resnet10", "width": 8, "stem": "cifar"}
VIT = {"name": "vit_tiny_patch16_224"}


def build(seed, **spec):
    torch.manual_seed(seed)
    net = backbones.build(Backbone(**spec)).eval()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm):  # their initial values would hide a mix-up
            nn.init.normal_(m.weight, 1, 0.1)
            nn.init.normal_(m.bias, 0, 0.1)
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 2)
    if hasattr(net, "body"):
        nn.init.normal_(net.body.cls_token)
        for block in net.body.blocks:
            nn.init.normal_(block.attn.qkv.bias)
    return net


@pytest.fixture(scope="module")
def nets():
    """Per kind: the network to be found, and another that must not be."""
    small = {"resnet": RESNET, "vit": VIT, "gn": {**RESNET, "norm": "gn"}}
    return {kind: (build(0, **spec), build(1, **spec)) for kind, spec in small.items()}


def keys(net):
    return dict(getattr(net, "body", net).state_dict())


def under(prefix, net_or_state):
    state = net_or_state if isinstance(net_or_state, dict) else keys(net_or_state)
    return {prefix + key: value for key, value in state.items()}


def linear(prefix, out=4, inside=64):
    return {prefix + "weight": torch.randn(out, inside), prefix + "bias": torch.randn(out)}


OPTIMIZER = {"state": {0: {"momentum_buffer": torch.zeros(3), "step": 3}}, "param_groups": [{"lr": 0.1, "params": [0]}]}


def numbered(net, first=4):
    """Keys of nn.Sequential(*list(resnet.children())[:-1])."""
    names = {"conv1": "0", "bn1": "1"} | {f"layer{i + 1}": str(first + i) for i in range(4)}
    return {".".join((names[key.split(".")[0]], *key.split(".")[1:])): value for key, value in keys(net).items()}


def mmcv_norm(net):
    return {key.replace("bn", "gn"): value for key, value in keys(net).items()}


OPENMMLAB = {"norm1": "ln1", "norm2": "ln2", "mlp.fc1": "ffn.layers.0.0", "mlp.fc2": "ffn.layers.1"}


def openmmlab_vit(net):
    out = {}
    for key, value in keys(net).items():
        parts = key.split(".")
        if parts[0] == "blocks":
            inner = ".".join(parts[2:-1])
            key = f"layers.{parts[1]}.{OPENMMLAB.get(inner, inner)}.{parts[-1]}"
        elif parts[0] in ("patch_embed", "norm"):
            key = ("ln1." if parts[0] == "norm" else "patch_embed.projection.") + parts[-1]
        out[key] = value
    return out


def moco(net, other):
    return {"epoch": 200, "arch": "resnet50", "optimizer": OPTIMIZER, "state_dict": {
        **under("module.encoder_q.", net), **linear("module.encoder_q.fc.0."), **linear("module.encoder_q.fc.2."),
        **under("module.encoder_k.", other), **linear("module.encoder_k.fc.0."), "module.queue": torch.ones(4, 8),
        "module.queue_ptr": torch.zeros(1)}}  # fmt: skip


def dino(net, other):
    """Also the scripts' argparse.Namespace, as the published full checkpoints have it."""
    return {"student": {**under("module.backbone.", other), **linear("module.head.mlp.0.")},
            "teacher": {**under("backbone.", net), "head.last_layer.weight_g": torch.ones(4, 1)}, "epoch": 100,
            "optimizer": OPTIMIZER, "args": argparse.Namespace(arch="vit_small", lr=0.1),
            "dino_loss": collections.OrderedDict(center=torch.ones(1, 4))}  # fmt: skip


def mae(net, other):
    decoder = {"mask_token": torch.ones(1, 1, 4), "decoder_pos_embed": torch.ones(1, 5, 4),
               **linear("decoder_embed."), **linear("decoder_blocks.0.norm1."), **linear("decoder_norm."),
               **linear("decoder_pred.")}  # fmt: skip
    return {"model": {**keys(net), **decoder}, "args": argparse.Namespace(mask_ratio=0.75), "optimizer": OPTIMIZER}


def trunk(inner):
    return {"phase_idx": 9, "iteration": 3, "classy_state_dict": {"train": True, "base_model": {
        "model": {"trunk": inner, "heads": linear("0.clf.0.")}, "meta": {"config": {}}}}}  # fmt: skip


def openselfsup(net, other):
    """OpenSelfSup's MoCo registers its backbone twice."""
    return {"meta": {"epoch": 200, "config": "model = dict(backbone=dict(depth=50))"}, "optimizer": OPTIMIZER,
            "state_dict": {**under("encoder_q.0.", net), **under("encoder_k.0.", other), **under("backbone.", net),
                           **linear("encoder_q.1.mlp.0."), "queue": torch.ones(2)}}  # fmt: skip


LAYOUTS = {  # project: kind of network, its checkpoint, the prefix expected
    "OpenSelfSup": ("resnet", openselfsup, "state_dict.backbone."),
    "OpenSelfSup, extracted": ("resnet", lambda n, o: {"state_dict": keys(n), "author": "OpenSelfSup"}, "state_dict."),
    "OpenSelfSup BYOL": ("resnet", lambda n, o: {"state_dict": {
        **under("online_net.0.", n), **under("target_net.0.", o), **under("backbone.", n)}}, "state_dict.backbone."),
    "OpenSelfSup, group norm": ("gn", lambda n, o: {"state_dict": under("backbone.", mmcv_norm(n))},
                                "state_dict.backbone."),
    "MMSelfSup MoCo": ("resnet", lambda n, o: {"meta": {"cfg": "x = 1"}, "state_dict": {
        **under("backbone.", n), **linear("neck.mlp.0."), **under("encoder_k.module.0.", o)}}, "state_dict.backbone."),
    "MMSelfSup MoCo v3, ViT": ("vit", lambda n, o: {"state_dict": {
        **under("backbone.", openmmlab_vit(n)), **under("momentum_encoder.module.0.", openmmlab_vit(o))}},
        "state_dict.backbone."),
    "MMSelfSup MAE, extracted": ("vit", lambda n, o: {"state_dict": openmmlab_vit(n)}, "state_dict."),
    "MoCo": ("resnet", moco, "state_dict.module.encoder_q."),
    "MoCo v3": ("vit", lambda n, o: {"state_dict": {
        **under("module.base_encoder.", n), **linear("module.base_encoder.head.0."),
        **under("module.momentum_encoder.", o), **linear("module.predictor.0.")}}, "state_dict.module.base_encoder."),
    "SimSiam": ("resnet", lambda n, o: {"state_dict": {
        **under("module.encoder.", n), **linear("module.encoder.fc.0."), **linear("module.predictor.0.")}},
        "state_dict.module.encoder."),
    "byol-pytorch (lucidrains)": ("resnet", lambda n, o: {
        **under("net.", n), **linear("net.fc."), **under("online_encoder.net.", n), **linear("online_encoder.net.fc."),
        **under("target_encoder.net.", o), **linear("online_predictor.0.")}, "net."),
    "PyTorch-BYOL (sthalles)": ("resnet", lambda n, o: {
        "online_network_state_dict": {**under("encoder.", numbered(n)), **linear("projetion.net.0.")},
        "target_network_state_dict": {**under("encoder.", numbered(o)), **linear("projetion.net.0.")}},
        "online_network_state_dict.encoder."),
    "SwAV": ("resnet", lambda n, o: {
        **under("module.", n), **linear("module.projection_head.0."), "module.prototypes.weight": torch.ones(9, 2)},
        "module."),
    "Barlow Twins": ("resnet", lambda n, o: keys(n), ""),
    "Barlow Twins, full": ("resnet", lambda n, o: {"epoch": 1, "model": {
        **under("module.backbone.", n), **linear("module.projector.0."), "module.bn.running_mean": torch.ones(4)}},
        "model.module.backbone."),
    "VICReg, full": ("resnet", lambda n, o: {"model": {**under("module.backbone.", n), **linear("module.projector.0.")},
                                             "optimizer": OPTIMIZER}, "model.module.backbone."),
    "DINO": ("vit", dino, "teacher.backbone."),
    "MAE": ("vit", mae, "model."),
    "solo-learn": ("resnet", lambda n, o: {"pytorch-lightning_version": "2", "state_dict": {
        **under("backbone.", n), **under("momentum_backbone.", o), **linear("classifier."), **linear("projector.0.")},
        "optimizer_states": [OPTIMIZER]}, "state_dict.backbone."),
    "lightly, numbered": ("resnet", lambda n, o: {"state_dict": {
        **under("backbone.", numbered(n)), **under("backbone_momentum.", numbered(o)),
        **linear("projection_head.layers.0.")}}, "state_dict.backbone."),
    "lightly, its own ResNet": ("resnet", lambda n, o: {"state_dict": under("backbone.", {
        key.replace("downsample", "shortcut"): value for key, value in numbered(n, first=2).items()})},
        "state_dict.backbone."),
    "lightly, its own ResNet whole": ("resnet", lambda n, o: {
        **{key.replace("downsample", "shortcut"): value for key, value in keys(n).items()}, **linear("linear.")}, ""),
    "lightly DINO": ("resnet", lambda n, o: {"state_dict": {
        **under("student_backbone.", o), **under("teacher_backbone.", n)}}, "state_dict.teacher_backbone."),
    "VISSL": ("resnet", lambda n, o: trunk(under("_feature_blocks.", n)),
              "classy_state_dict.base_model.model.trunk._feature_blocks."),
    "VISSL, ViT": ("vit", lambda n, o: trunk(keys(n)), "classy_state_dict.base_model.model.trunk."),
    "timm": ("vit", lambda n, o: {"arch": "vit", "state_dict": {**keys(n), **linear("head.")},
                                  "state_dict_ema": {**keys(o), **linear("head.")}}, "state_dict."),
}  # fmt: skip


@pytest.mark.parametrize("project", LAYOUTS)
def test_layout_is_recognised_and_gives_the_same_features(project, nets, tmp_path):
    kind, make, prefix = LAYOUTS[project]
    net, other = nets[kind]
    torch.save(make(net, other), tmp_path / "a.pth")
    mine = build(2, **{k: getattr(net.spec, k) for k in ("name", "width", "stem", "norm")})
    report = weights.load_backbone(tmp_path / "a.pth", mine)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(mine(x), net(x), rtol=0, atol=0)
        assert not torch.allclose(other(x), net(x), atol=1e-2)
    assert report.prefix == prefix
    assert report.loaded >= len([k for k in keys(net) if "num_batches" not in k])
    assert repr(prefix) in str(report) or prefix == ""


@pytest.mark.parametrize("project", ["MMSelfSup MAE, extracted", "lightly, numbered", "MoCo"])
@pytest.mark.parametrize("key", ["first", "last"])
def test_one_lost_tensor_is_an_error_in_every_layout(project, key, nets, tmp_path):
    kind, make, _ = LAYOUTS[project]
    net, other = nets[kind]
    checkpoint = make(net, other)
    state = checkpoint["state_dict"]
    mine = [k for k in state if "encoder_k" not in k and "momentum" not in k and not k.endswith("num_batches_tracked")
            and ".fc." not in k and "head" not in k and "queue" not in k]  # fmt: skip
    for k in list(state):  # the other copy would be found instead
        if k not in mine or k == mine[0 if key == "first" else -1]:
            del state[k]
    torch.save(checkpoint, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="1 of the backbone's"):
        weights.load_backbone(tmp_path / "a.pth", other)


@pytest.mark.parametrize("project, which, prefix", [
    ("DINO", "student", "student.module.backbone."),
    ("DINO", "teacher", "teacher.backbone."),
    ("MoCo", "student", "state_dict.module.encoder_q."),
    ("MoCo", "teacher", "state_dict.module.encoder_k."),
    ("lightly DINO", "student", "state_dict.student_backbone."),
    ("solo-learn", "teacher", "state_dict.momentum_backbone."),
    ("timm", "teacher", "state_dict_ema."),
    ("PyTorch-BYOL (sthalles)", "teacher", "target_network_state_dict.encoder."),
])  # fmt: skip
def test_student_or_teacher(project, which, prefix, nets, tmp_path):
    kind, make, default = LAYOUTS[project]
    net, other = nets[kind]
    torch.save(make(net, other), tmp_path / "a.pth")
    mine = build(2, **{k: getattr(net.spec, k) for k in ("name", "width", "stem", "norm")})
    assert weights.load_backbone(tmp_path / "a.pth", mine, which=which).prefix == prefix
    expected = net if prefix == default else other
    assert all(torch.equal(value, keys(expected)[key]) for key, value in keys(mine).items())


def test_a_single_copy_has_no_teacher(nets, tmp_path):
    net, other = nets["resnet"]
    torch.save(under("backbone.", net), tmp_path / "a.pth")
    with pytest.raises(ValueError, match="does not say which copy is its teacher; it has 'backbone.'"):
        weights.load_backbone(tmp_path / "a.pth", other, which="teacher")
    with pytest.raises(ValueError, match="both choose a copy"):
        weights.load_backbone(tmp_path / "a.pth", other, which="teacher", prefix="backbone.")


def test_a_given_prefix_is_the_files_own(nets, tmp_path):
    net, other = nets["resnet"]
    torch.save(LAYOUTS["lightly, numbered"][1](net, other), tmp_path / "a.pth")
    mine = build(2, **RESNET)
    report = weights.load_backbone(tmp_path / "a.pth", mine, prefix="state_dict.backbone_momentum")
    assert report.layout == "numbered children"
    assert all(torch.equal(value, keys(other)[key]) for key, value in keys(mine).items())


def test_torchvision_vit_is_timms(tmp_path):
    """torchvision's own network computes the features to compare with."""
    torch.manual_seed(0)
    theirs = torchvision.models.VisionTransformer(224, 16, 12, 3, 192, 768).eval()
    nn.init.normal_(theirs.class_token)
    for layer in theirs.encoder.layers:
        nn.init.normal_(layer.self_attention.in_proj_bias)
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    mine = build(1, **VIT)
    report = weights.load_backbone(tmp_path / "a.pth", mine)
    assert report.layout == "torchvision ViT" and report.heads == ["heads.head.weight", "heads.head.bias"]
    theirs.heads = nn.Identity()
    x = torch.randn(1, 3, 224, 224, dtype=torch.double)
    with torch.no_grad():
        torch.testing.assert_close(mine.double()(x), theirs.double()(x), rtol=0, atol=1e-6)


def test_safetensors_of_others(nets, tmp_path):
    net, _ = nets["vit"]
    state = {k: v.contiguous() for k, v in under("backbone.", openmmlab_vit(net)).items()}
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    mine = build(1, **VIT)
    assert weights.load_backbone(tmp_path / "a.safetensors", mine).layout == "OpenMMLab ViT"
    assert all(torch.equal(value, keys(net)[key]) for key, value in keys(mine).items())


@pytest.mark.parametrize("meta, text", [
    ({"config": "backbone=dict(type='ResNet', style='caffe')"}, "strides in the 1x1"),
    ({"cfg": "conv_cfg=dict(type='ConvWS')"}, "standardise their weights"),
])  # fmt: skip
def test_networks_of_equal_keys_and_other_arithmetic_are_refused(meta, text, nets, tmp_path):
    net, other = nets["resnet"]
    torch.save({"meta": meta, "state_dict": keys(net)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=text):
        weights.load_backbone(tmp_path / "a.pth", other)


def test_every_layout_is_shown_by_a_checkpoint_above(nets):
    shown = {"torchvision ViT"}
    for kind, make, _ in LAYOUTS.values():
        flat = weights._flat(make(*nets[kind]))
        shown |= {layout for layout, _ in foreign.renamed(list(flat))}
    assert shown == set(foreign.LAYOUTS)
