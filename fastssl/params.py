"""`fastssl params`: the parameters of a network or a method, and the FLOPs of the backbone's forward pass."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastssl import backbones, config, options
from fastssl.config import Backbone
from fastssl.config.backbone_options import build_spec, given_fields
from fastssl.parsing import columns, run_command
from fastssl.plan import training_samples
from fastssl.trainer import Context


def params(
    target: str,
    overrides: Sequence[str] = (),
    *,
    size: int | None = None,
    samples: int | None = None,
    spec: Backbone | None = None,
) -> list[tuple[str, str]]:
    """(label, value) for a config file or a backbone's name.  The network is built on the meta device, which allocates
    nothing."""
    run = config.load(target, list(overrides)) if target.endswith(".py") else None
    spec = run.backbone if run else spec or Backbone(name=target)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are about training with the ranks of this process
        backbone = backbones.build(spec, run and run.method)
        rows = [("backbone", spec.name), *_parameters("backbone", backbone)]
        if run:
            samples = samples or training_samples(run)
            classes = list(map(str, range(1000)))
            method = run.method.build(backbone, Context(samples, run.optim.batch, classes, kernels=run.speed.kernels))
            stored = sum(b.numel() * b.element_size() for b in method.buffers())
            rows += [
                ("method", type(run.method).__module__.rpartition(".")[2]),
                *_parameters("method", method),
                (f"method's buffers at {samples:,} samples", f"{stored / 2**20:.2f} MiB"),
            ]
    sizes = sorted({v.size for v in run.data.views}, reverse=True) if run else [_default_size(backbone)]
    for side in [size] if size else sizes:
        amount = flops(backbone, side)
        label = f"backbone's forward, one image of {side} x {side}"
        rows.append((label, f"{amount / 1e9:.3f} GFLOPs ({amount / 2e9:.3f} GMACs)"))
    return rows


def flops(backbone: nn.Module, size: int) -> int:
    """FLOPs of the forward pass of one image of `size` x `size` pixels.  A multiplication and its addition are 2, in
    convolutions and matrix products alone, as papers count (some print half of it, called MACs)."""
    device, training = next(backbone.parameters()).device, backbone.training
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        backbone.eval()(torch.zeros(1, backbone.spec.in_channels, size, size, device=device))
    backbone.train(training)
    return counter.get_total_flops()


def _parameters(name: str, module: nn.Module) -> list[tuple[str, str]]:
    total = sum(p.numel() for p in module.parameters())
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return [
        (f"{name}'s parameters", f"{total:,} ({total / 1e6:.2f} M)"),
        (f"{name}'s trained parameters", f"{trained:,} ({trained / 1e6:.2f} M)"),
    ]


def _default_size(backbone: nn.Module) -> int:
    timm_cfg = getattr(getattr(backbone, "body", None), "pretrained_cfg", None)
    return timm_cfg["input_size"][-1] if timm_cfg else 224 if backbone.spec.stem == "imagenet" else 32


def main(argv: list[str] | None = None) -> int:
    args = options.parse("params", argv)

    def work() -> None:
        given = given_fields(args)
        is_config = args.target.endswith(".py")
        if is_config and (given or args.option):
            first = next(iter([*given, "options.NAME"]))
            raise ValueError(f"{args.target} names its backbone: give backbone.{first}=... instead")
        if not is_config and args.overrides:
            raise ValueError(f"{args.overrides[0]!r} replaces a setting of a config, and {args.target} is a backbone")
        spec = None if is_config else build_spec(args.target, given, args.option)
        rows = params(args.target, args.overrides, size=args.size, samples=args.samples, spec=spec)
        print(columns(rows, left=2))

    return run_command("params", work)
