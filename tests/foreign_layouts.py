"""Checkpoints in the layouts of other projects, made of two networks.  Not a test."""

import argparse
import collections
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))


def keys(net):
    return dict(net.state_dict())


def under(prefix, net_or_state):
    state = net_or_state if isinstance(net_or_state, dict) else keys(net_or_state)
    return {prefix + key: value for key, value in state.items()}


def linear(prefix, out=4, inside=64):
    return {prefix + "weight": torch.randn(out, inside), prefix + "bias": torch.randn(out)}


OPTIMIZER = {"state": {0: {"momentum_buffer": torch.zeros(3), "step": 3}}, "param_groups": [{"lr": 0.1, "params": [0]}]}


def moco(net, other):
    return {
        "epoch": 200,
        "arch": "resnet50",
        "optimizer": OPTIMIZER,
        "state_dict": {
            **under("module.encoder_q.", net),
            **linear("module.encoder_q.fc.0."),
            **linear("module.encoder_q.fc.2."),
            **under("module.encoder_k.", other),
            **linear("module.encoder_k.fc.0."),
            "module.queue": torch.ones(4, 8),
            "module.queue_ptr": torch.zeros(1),
        },
    }


def dino(net, other):
    """With the argparse.Namespace that the published full checkpoints contain."""
    return {
        "student": {**under("module.backbone.", other), **linear("module.head.mlp.0.")},
        "teacher": {**under("backbone.", net), "head.last_layer.weight_g": torch.ones(4, 1)},
        "epoch": 100,
        "optimizer": OPTIMIZER,
        "args": argparse.Namespace(arch="vit_small", lr=0.1),
        "dino_loss": collections.OrderedDict(center=torch.ones(1, 4)),
    }


def mae(net, other):
    decoder = {
        "mask_token": torch.ones(1, 1, 4),
        "decoder_pos_embed": torch.ones(1, 5, 4),
        **linear("decoder_embed."),
        **linear("decoder_blocks.0.norm1."),
        **linear("decoder_norm."),
        **linear("decoder_pred."),
    }
    return {"model": {**keys(net), **decoder}, "args": argparse.Namespace(mask_ratio=0.75), "optimizer": OPTIMIZER}


def trunk(inner):
    return {
        "phase_idx": 9,
        "iteration": 3,
        "classy_state_dict": {
            "train": True,
            "base_model": {"model": {"trunk": inner, "heads": linear("0.clf.0.")}, "meta": {"config": {}}},
        },
    }


def openselfsup(net, other):
    """OpenSelfSup's MoCo registers its backbone twice."""
    return {
        "meta": {"epoch": 200, "config": "model = dict(backbone=dict(depth=50))"},
        "optimizer": OPTIMIZER,
        "state_dict": {
            **under("encoder_q.0.", net),
            **under("encoder_k.0.", other),
            **under("backbone.", net),
            **linear("encoder_q.1.mlp.0."),
            "queue": torch.ones(2),
        },
    }


LAYOUTS = {  # project: kind of network (peers.KINDS), its checkpoint, the prefix expected
    "OpenSelfSup": ("resnet", openselfsup, "state_dict.backbone."),
    "OpenSelfSup, extracted": ("resnet", lambda n, o: {"state_dict": keys(n), "author": "OpenSelfSup"}, "state_dict."),
    "OpenSelfSup BYOL": (
        "resnet",
        lambda n, o: {
            "state_dict": {**under("online_net.0.", n), **under("target_net.0.", o), **under("backbone.", n)}
        },
        "state_dict.backbone.",
    ),
    "OpenSelfSup, group norm": ("mmlab gn", lambda n, o: {"state_dict": under("backbone.", n)}, "state_dict.backbone."),
    "MMSelfSup MoCo": (
        "resnet",
        lambda n, o: {
            "meta": {"cfg": "x = 1"},
            "state_dict": {**under("backbone.", n), **linear("neck.mlp.0."), **under("encoder_k.module.0.", o)},
        },
        "state_dict.backbone.",
    ),
    "MMSelfSup MoCo v3, ViT-S": (
        "mmlab mocov3",
        lambda n, o: {"state_dict": {**under("backbone.", n), **under("momentum_encoder.module.0.", o)}},
        "state_dict.backbone.",
    ),
    "MMSelfSup MAE, extracted": ("mmlab vit", lambda n, o: {"state_dict": keys(n)}, "state_dict."),
    "MoCo": ("resnet", moco, "state_dict.module.encoder_q."),
    "MoCo v3": (
        "mocov3",
        lambda n, o: {
            "arch": "vit_small",
            "state_dict": {
                **under("module.base_encoder.", n),
                **linear("module.base_encoder.head.0."),
                **under("module.momentum_encoder.", o),
                **linear("module.predictor.0."),
            },
        },
        "state_dict.module.base_encoder.",
    ),
    "SimSiam": (
        "resnet",
        lambda n, o: {
            "state_dict": {
                **under("module.encoder.", n),
                **linear("module.encoder.fc.0."),
                **linear("module.predictor.0."),
            }
        },
        "state_dict.module.encoder.",
    ),
    "byol-pytorch (lucidrains)": (
        "resnet",
        lambda n, o: {
            **under("net.", n),
            **linear("net.fc."),
            **under("online_encoder.net.", n),
            **linear("online_encoder.net.fc."),
            **under("target_encoder.net.", o),
            **linear("online_predictor.0."),
        },
        "net.",
    ),
    "PyTorch-BYOL (sthalles)": (
        "numbered",
        lambda n, o: {
            "online_network_state_dict": {**under("encoder.", n), **linear("projetion.net.0.")},
            "target_network_state_dict": {**under("encoder.", o), **linear("projetion.net.0.")},
        },
        "online_network_state_dict.encoder.",
    ),
    "SimCLR (leftthomas)": ("numbered, no pool", lambda n, o: {**under("f.", n), **linear("g.0.")}, "f."),
    "SwAV": (
        "resnet 7x7",
        lambda n, o: {
            **under("module.", n),
            **linear("module.projection_head.0."),
            "module.prototypes.weight": torch.ones(9, 2),
        },
        "module.",
    ),
    "Barlow Twins": ("resnet", lambda n, o: keys(n), ""),
    "Barlow Twins, full": (
        "resnet",
        lambda n, o: {
            "epoch": 1,
            "model": {
                **under("module.backbone.", n),
                **linear("module.projector.0."),
                "module.bn.running_mean": torch.ones(4),
            },
        },
        "model.module.backbone.",
    ),
    "VICReg, full": (
        "resnet",
        lambda n, o: {
            "model": {**under("module.backbone.", n), **linear("module.projector.0.")},
            "optimizer": OPTIMIZER,
        },
        "model.module.backbone.",
    ),
    "DINO": ("vit", dino, "teacher.backbone."),
    "MAE": ("vit", mae, "model."),
    "solo-learn": (
        "resnet pad 2",
        lambda n, o: {
            "pytorch-lightning_version": "2",
            "state_dict": {
                **under("backbone.", n),
                **under("momentum_backbone.", o),
                **linear("classifier."),
                **linear("projector.0."),
            },
            "optimizer_states": [OPTIMIZER],
        },
        "state_dict.backbone.",
    ),
    "solo-learn MoCo v3, ViT-Ti": (
        "mocov3",
        lambda n, o: {
            "pytorch-lightning_version": "2",
            "state_dict": {**under("backbone.", n), **under("momentum_backbone.", o), **linear("classifier.")},
        },
        "state_dict.backbone.",
    ),
    "lightly, numbered": (
        "numbered",
        lambda n, o: {
            "state_dict": {
                **under("backbone.", n),
                **under("backbone_momentum.", o),
                **linear("projection_head.layers.0."),
            }
        },
        "state_dict.backbone.",
    ),
    "lightly, its own ResNet numbered": (
        "lightly numbered",
        lambda n, o: {"state_dict": under("backbone.", n)},
        "state_dict.backbone.",
    ),
    "lightly, its own ResNet whole": ("lightly", lambda n, o: {**keys(n), **linear("linear.")}, ""),
    "lightly DINO": (
        "resnet",
        lambda n, o: {"state_dict": {**under("student_backbone.", o), **under("teacher_backbone.", n)}},
        "state_dict.teacher_backbone.",
    ),
    "VISSL": (
        "resnet",
        lambda n, o: trunk(under("_feature_blocks.", n)),
        "classy_state_dict.base_model.model.trunk._feature_blocks.",
    ),
    "VISSL, ViT": ("vit", lambda n, o: trunk(keys(n)), "classy_state_dict.base_model.model.trunk."),
    "timm": (
        "vit",
        lambda n, o: {
            "arch": "vit",
            "state_dict": {**keys(n), **linear("head.")},
            "state_dict_ema": {**keys(o), **linear("head.")},
        },
        "state_dict.",
    ),
    "torchvision, ViT": ("torchvision vit", lambda n, o: {**keys(n), **linear("heads.head.")}, ""),
}
