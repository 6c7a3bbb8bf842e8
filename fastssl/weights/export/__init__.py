"""Writing a backbone for other tools, each with the Python that loads it: `fastssl export RUN --to TARGET`.

"torchvision", "timm": a .pth of their network of that name; thin ResNets are built by torchvision's class.
"safetensors": any backbone, with its description.  "detectron2": a .pkl with its names.  "huggingface": a folder that
timm loads, with a model card, ready to upload.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from fastssl import backbones, files, options, weights
from fastssl.backbones import positions
from fastssl.checkpoint import disk
from fastssl.config import Backbone
from fastssl.parsing import run_command
from fastssl.weights.export import to_detectron2, to_huggingface, to_timm, to_torchvision
from fastssl.weights.export.common import Target, default_target, image_size, normalization
from fastssl.weights.options import backbone_from


def write(
    backbone: nn.Module,
    path: str | Path,
    to: Target | None = None,
    *,
    run: dict | None = None,
    steps: int | None = None,
) -> str:
    """Write the backbone's tensors and return the Python that loads them.  ValueError where the tool lacks the network.

    `to`: None takes torchvision for its ResNets, timm for any other.  `run`: config.json of its run, and `steps`: the
    steps that it has made; the image size, mean and std and the model card are taken from these.
    """
    to = to or default_target(backbone.spec)
    if to not in TARGETS:
        raise ValueError(f"export to {to!r}: known are {', '.join(TARGETS)}")
    path, spec = Path(path), backbone.spec
    state = {k: v.detach().cpu().contiguous() for k, v in getattr(backbone, "body", backbone).state_dict().items()}
    if spec.norm == "frozen":  # other tools have it as an ordinary batch norm
        spec = dataclasses.replace(spec, norm="bn")
        state |= {
            re.sub("running_mean$", "num_batches_tracked", k): torch.tensor(0)
            for k in state
            if k.endswith("running_mean")
        }
    empty = [name for name, value in state.items() if value.numel() == 0]
    if empty:
        raise ValueError(f"{empty[0]} is empty: this backbone is partitioned by ZeRO-3; export from its run folder")
    if spec.sobel and to != "safetensors":
        raise ValueError(f"{to} has no network that begins with Sobel filters: export to safetensors")
    if to in ("timm", "huggingface"):
        spec, state = _at_size(backbone, spec, state, image_size(run))
    if run:
        run = {**run, "steps_done": steps}
    _, writer = TARGETS[to]
    code = writer(state, spec, path, run)
    if run and to != "detectron2":
        (mean, std), size = normalization(run), image_size(run)
        code += f"\nmean, std = {mean}, {std}  # of the channels of its images, in [0, 1]; "
        code += f"trained at {size} x {size} pixels"
    return code


def _at_size(
    backbone: nn.Module, spec: Backbone, state: dict[str, Tensor], size: int | None
) -> tuple[Backbone, dict[str, Tensor]]:
    """A vision transformer at the size that it was trained at: position embeddings of that size, and timm's option for
    it.  Other networks are returned as they are."""
    body = getattr(backbone, "body", None)
    if body is None or not isinstance(size, int) or not positions.uses_dino_resampling(body):
        return spec, state
    old, patch = tuple(body.patch_embed.grid_size), body.patch_embed.patch_size
    new = (size // patch[0], size // patch[1])
    if new == old or size % patch[0] or size % patch[1]:
        return spec, state
    table = positions.resample(state["pos_embed"], old, new).contiguous()
    return dataclasses.replace(spec, options={**spec.options, "img_size": size}), {**state, "pos_embed": table}


def _write_safetensors(state: dict[str, Tensor], spec: Backbone, path: Path, run: dict | None) -> str:
    files.write_safetensors(path, state, weights.metadata(spec))
    return (
        "from fastssl import backbones, weights  # without fastssl, safetensors.torch.load_file reads the tensors\n"
        f"net = backbones.build(weights.spec_of({str(path)!r}))\nweights.load_backbone({str(path)!r}, net)"
    )


# Each writer takes (state, spec, path, run) and returns the Python that loads what it wrote.
TARGETS: dict[str, tuple[str, Callable[[dict, Backbone, Path, dict | None], str]]] = {  # default file name, writer
    "torchvision": ("backbone.pth", to_torchvision.write),
    "timm": ("backbone_timm.pth", to_timm.write),
    "safetensors": ("backbone.safetensors", _write_safetensors),
    "detectron2": ("backbone_detectron2.pkl", to_detectron2.write),
    "huggingface": ("huggingface", to_huggingface.write),
}


def main(argv: list[str] | None = None) -> int:
    """`fastssl export RUN_OR_WEIGHTS --to TARGET`"""
    args = options.parse("export", argv)

    def work() -> None:
        spec = backbone_from(args, args.run)
        if spec is None:
            raise ValueError(
                f"{args.run} does not say which backbone it holds: it is neither a run folder nor an export of "
                "fastssl; give --backbone NAME"
            )
        folder = Path(args.run) if Path(args.run).is_dir() else Path(args.run).parent
        to: Target = args.to or default_target(spec)
        out = args.out or folder / TARGETS[to][0]
        backbone = backbones.build(spec)
        report = weights.load_backbone(args.run, backbone, prefix=args.prefix, which=args.which)
        print(report)
        step = disk.step_of(Path(report.file).parent)
        code = write(backbone, out, to, run=weights.run_config(args.run), steps=None if step < 0 else step)
        print(f"wrote {out}; load it with\n\n{code}")

    return run_command("export", work)
