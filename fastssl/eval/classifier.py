"""The accuracy of the linear classifier in a supervised run or checkpoint (OpenSelfSup's test.py)."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from fastssl import weights
from fastssl.eval.common.features import check_features
from fastssl.eval.common.metrics import accuracy
from fastssl.eval.common.target import EvalTarget

NEEDS = ("test",)
NAMES = ("head", "fc", "fc_cls", "classifier", "linear")  # last word of the layer's name in a file


def run(target: EvalTarget, args: argparse.Namespace) -> dict:
    if args.target is None:
        raise ValueError("give a run folder or a weight file")
    trained = target.run and target.run["data"].get("train")
    if trained and Path(trained).exists():
        target.train = trained
        target.match_classes("test")
    file, state = weights.read(args.target)
    weight, bias = (part.to(args.device) for part in head(file, state, target.backbone.dim, args.head))
    return classify(*target.features(target.test), weight, bias)


def head(file: str, state: dict[str, Tensor], dim: int, name: str | None = None) -> tuple[Tensor, Tensor]:
    """Weight (C, dim) and bias (C,) of the linear classifier on features of `dim` dimensions in a file.  `name`: the
    end of its name; None for the usual ones.  ValueError where there is not exactly one."""
    layers = [key.removesuffix(".weight") for key, value in state.items() if value.shape[1:] == (dim,)]
    found = [layer for layer in layers if f"{layer}.weight" in state and f"{layer}.bias" in state]
    named = [key for key in found if (f".{key}".endswith(f".{name}") if name else key.split(".")[-1] in NAMES)]
    if name and not named:
        raise ValueError(
            f"--head {name}: {file} has no such linear layer on {dim} features"
            + (f"; it has {', '.join(found)}" if found else "")
        )
    if len(named) != 1:
        raise ValueError(
            f"{file} holds {len(named)} classifiers on {dim} features ({', '.join(named) or 'none'}): "
            + ("choose one with --head" if named else "`fastssl eval linear` trains one")
        )
    return state[f"{named[0]}.weight"].float(), state[f"{named[0]}.bias"].float()


@torch.no_grad()
def classify(features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> dict:
    """Accuracy in percent: features (N, dim), labels (N,), weight (C, dim), bias (C,)."""
    check_features("test set", features, labels)
    classes = len(weight)
    if int(labels.max()) >= classes:
        raise ValueError(
            f"the test set has class {int(labels.max())}, the classifier {classes} classes (0 to "
            f"{classes - 1}): does it belong to the same data?"
        )
    scores = features @ weight.T + bias
    options = {"test": len(labels), "dim": features.shape[1], "classes": classes}
    return {"protocol": "classifier", "options": options, "results": [accuracy(scores, labels)]}
