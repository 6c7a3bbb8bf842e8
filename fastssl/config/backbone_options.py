"""Command-line options that describe a backbone.  Without torch, so that --help takes no seconds."""

from __future__ import annotations

import argparse

from fastssl.config import settings
from fastssl.config.sections import Backbone

FIELDS = ("stem", "norm", "width", "in_channels", "sobel")  # of Backbone, each an option


def add_backbone_options(parser: argparse.ArgumentParser, name: bool = True) -> None:
    """`name`: with --backbone, for commands whose argument is not the name."""
    if name:
        parser.add_argument("--backbone", metavar="NAME", help="for weights that do not say what they are")
    default = Backbone("resnet50")
    for key in ("stem", "norm"):
        choices = settings.choices(Backbone, key)
        parser.add_argument(f"--{key}", choices=choices, help=f"of a ResNet; default: {getattr(default, key)}")
    parser.add_argument("--width", type=int, help=f"channels of a ResNet's first stage; default: {default.width}")
    parser.add_argument("--in-channels", type=int, dest="in_channels", help=f"default: {default.in_channels}")
    about = "the network sees gradients (DeepCluster); default: if the weights' first convolution has two channels"
    parser.add_argument("--sobel", action="store_true", default=None, help=about)
    about = "an argument of timm's model, such as num_heads=12; may be given several times"
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help=about)


def given_fields(args: argparse.Namespace) -> dict:
    """The fields of Backbone that the command line sets, without --option."""
    return {key: getattr(args, key) for key in FIELDS if getattr(args, key) is not None}


def build_spec(name: str, fields: dict, options: list[str]) -> Backbone:
    """`options`: NAME=VALUE of timm's model."""
    spec = Backbone(name=name, **fields)
    for option in options:
        settings.assign(spec, f"options.{option}")
    return spec
