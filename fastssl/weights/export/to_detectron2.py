"""A .pkl for detectron2, with its names of a ResNet's tensors."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastssl import files
from fastssl.config import Backbone
from fastssl.weights.export.common import normalization, unsupported
from fastssl.weights.foreign import by_patterns

# torchvision's names of a ResNet's tensors -> detectron2's
detectron2_names = by_patterns(
    (r"^(?!layer)", "stem."),
    (r"^layer(\d)", lambda m: f"res{int(m[1]) + 1}"),
    (r"\bbn(\d)", r"conv\1.norm"),
    (r"downsample\.0", "shortcut"),
    (r"downsample\.1", "shortcut.norm"),
)


class _Pickler(pickle.Pickler):
    """Pickles arrays by public names, which NumPy 1 and 2 share: detectron2 often runs in old environments."""

    def reducer_override(self, value: object) -> Any:
        if isinstance(value, np.ndarray):
            return np.ndarray, (value.shape, value.dtype.str, bytearray(value.tobytes()))
        return NotImplemented


def write(state: dict[str, Tensor], spec: Backbone, path: Path, run: dict | None) -> str:
    depth = re.fullmatch(r"resne(?:x)?t(\d+)(?:_(\d+)x(\d+)d)?", spec.name)
    if not depth or int(depth[1]) < 18 or (spec.stem, spec.width, spec.in_channels) != ("imagenet", 64, 3):
        what = f" with stem={spec.stem!r}, width={spec.width}, in_channels={spec.in_channels}" if depth else ""
        unsupported(spec, "detectron2", f"{what} (its ResNets and ResNeXts are ImageNet's)")
    names = detectron2_names(state)
    model = {names[key]: value.numpy() for key, value in state.items()}
    with files.atomic_write(path) as temporary, open(temporary, "wb") as f:
        _Pickler(f, protocol=4).dump({"model": model, "__author__": "fastssl", "matching_heuristics": True})
    mean, std = ([round(255 * v, 3) for v in values] for values in normalization(run))
    resnets = {"DEPTH": int(depth[1]), "STRIDE_IN_1X1": False, "NORM": "GN" if spec.norm == "gn" else "SyncBN"}
    if depth[2]:
        resnets |= {"NUM_GROUPS": int(depth[2]), "WIDTH_PER_GROUP": int(depth[3])}
    if int(depth[1]) < 50:
        resnets["RES2_OUT_CHANNELS"] = 64
    lines = [
        "MODEL:",
        f'  WEIGHTS: "{path}"',
        f"  PIXEL_MEAN: {mean}",
        f"  PIXEL_STD: {std}",
        "  RESNETS:",
        *(f"    {key}: {value}" for key, value in resnets.items()),
        "INPUT:",
        '  FORMAT: "RGB"',
    ]
    return "\n".join(lines)
