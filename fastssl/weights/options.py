"""The backbone of weights: what they say it is, or what the command line says."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastssl import backbones
from fastssl.config import Backbone
from fastssl.config.backbone_options import build_spec, given_fields
from fastssl.weights.source import has_sobel, spec_of


def backbone_from(args: argparse.Namespace, path: str | Path | None = None) -> Backbone | None:
    """The architecture that the run or export at `path` names, else that of --backbone and its options; None where
    neither is there."""
    given = given_fields(args)
    known = spec_of(path) if path else None
    if known and (args.backbone or given or args.option):
        raise ValueError(
            f"{path} names its backbone ({known.name}): leave out --backbone, --stem, --norm, --width, "
            "--in-channels, --sobel and --option"
        )
    if (given or args.option) and not args.backbone:
        first = next(iter([*given, "option"])).replace("_", "-")
        raise ValueError(f"--{first} describes a backbone: give its --backbone NAME, too")
    if known or not args.backbone:
        return known
    if args.backbone in backbones.RESNETS and path and not {"sobel", "in_channels"} & set(given):
        given["sobel"] = has_sobel(path)
    return build_spec(args.backbone, given, args.option)
