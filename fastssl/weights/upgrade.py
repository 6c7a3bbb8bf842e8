"""`fastssl upgrade`: an old flat state dict in the current format."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fastssl import backbones, files, options, weights
from fastssl.config import Backbone
from fastssl.parsing import run_command
from fastssl.weights import export
from fastssl.weights.options import backbone_from
from fastssl.weights.source import read_model


def upgrade(old: str | Path, new: str | Path, spec: Backbone | None = None) -> str:
    """Write an old flat state dict in the current format; returns a line about what changed.

    With `spec` the backbone alone is written, to a .safetensors that describes it, after a check of every tensor.
    Without it keys stay as they are, but without DataParallel's `module.` and, as OpenSelfSup's upgrade, the heads."""
    old, new = Path(old), Path(new)
    if new.suffix not in (".safetensors", ".pth", ".pt"):
        raise ValueError(f"{new} must end in .safetensors or .pth")
    if new.exists():
        raise ValueError(f"{new} exists already")
    if spec:
        if new.suffix != ".safetensors":
            raise ValueError(f"{new} must end in .safetensors, which can hold the description of {spec.name}")
        backbone = backbones.build(spec)
        report = weights.load_backbone(old, backbone)
        export.write(backbone, new, "safetensors")
        return str(report)
    _, state = read_model(old)
    plain = {key.removeprefix("module."): value for key, value in state.items()}
    kept: dict[str, Tensor] = {k: v.clone().contiguous() for k, v in plain.items() if not k.startswith("head")}
    if not kept:
        raise ValueError(f"{old} holds nothing but heads")
    if new.suffix == ".safetensors":
        files.write_safetensors(new, kept, {"format": "pt"})
    else:
        with files.atomic_write(new) as temporary:
            torch.save({"state_dict": kept, "author": "fastssl"}, temporary)
    dropped = [key for key in plain if key not in kept]
    return f"{len(kept)} tensors from {old}" + (f"; heads left out: {', '.join(dropped)}" if dropped else "")


def main(argv: list[str] | None = None) -> int:
    args = options.parse("upgrade", argv)
    return run_command(
        "upgrade", lambda: print(f"{upgrade(args.old, args.new, backbone_from(args))}\nwrote {args.new}")
    )
