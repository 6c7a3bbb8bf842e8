"""`fastssl eval knn|linear`: a run folder or a weight file -> accuracies, printed as a table and written as JSON.

The protocols are functions of features: `knn.knn`, `linear.probe`; `features.extract` makes features.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from fastssl import backbones, dist, views, weights
from fastssl.amp import DTYPES
from fastssl.config import Backbone
from fastssl.eval import features, knn, linear
from fastssl.kernels.views import View
from fastssl.loader import Loader


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        args.device = dist.init(args.device)
        result = run(args)
        if dist.is_main():
            print(table([result]))
            if args.out:
                _write(args.out, result)
        dist.barrier()
    except (ValueError, OSError) as error:
        print(f"fastssl eval: {error}", file=sys.stderr)
        return 2
    finally:
        dist.shutdown()
    return 0


def run(args: argparse.Namespace) -> dict:
    """The protocol's result, with what it was computed from."""
    if args.target and not Path(args.target).exists():
        raise ValueError(f"no run folder or weight file {args.target}")
    config = args.target and weights.run_config(args.target)
    data = config["data"] if config else {}
    train = args.train or data.get("bank") or data.get("train")
    test = args.test or data.get("test")
    if not train or not test:
        raise ValueError(f"give --{'test' if train else 'train'} NAME.beton: {args.target or 'the command'} names none")
    spec = _spec(args, args.target and weights.spec_of(args.target))
    loaders = [Loader(path, args.batch * dist.world(), device=args.device, workers=args.workers, shuffle=False,
                      drop_last=False) for path in (train, test)]  # fmt: skip
    view = _view(args, data, spec, loaders[0].card)
    backbone, source = _backbone(args, spec, view)
    backbone.to(args.device)
    if dist.is_main():
        print(f"features of {source}")
    sets = [part for loader in loaders for part in features.extract(backbone, loader, view, precision=args.precision)]
    if args.protocol == "knn":
        result = knn.knn(*sets, k=args.k, temperature=args.temperature, backend=args.backend)
    else:
        result = linear.probe(*sets, solver=args.solver, grid=args.grid, epochs=args.epochs, batch=args.probe_batch,
                              held_out=args.held_out, seed=args.seed)  # fmt: skip
    made_of = {"backbone": dataclasses.asdict(spec), "features": args.features, "weights": str(source), "train": train,
               "test": test, "view": dataclasses.asdict(view), "precision": args.precision}  # fmt: skip
    return {**result, "of": made_of, "fastssl": version("fastssl")}


def table(results: list[dict]) -> str:
    """Results of any protocol under one header, a line each, with percentages."""
    rows = []
    for result in results:
        label = result.get("name") or result["protocol"]
        for line in result["results"]:
            setting = next(f"{key}={value:g}" for key, value in line.items() if not key.startswith("top"))
            rows.append([label, setting, *(f"{line[key]:.2f}" if key in line else "" for key in ("top1", "top5"))])
    rows.insert(0, ["protocol", "setting", "top-1 %", "top-5 %"])
    if not any(row[3] for row in rows[1:]):
        rows = [row[:3] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    padded = [[cell.rjust(w) if cell[-1:].isdigit() else cell.ljust(w) for cell, w in zip(row, widths)] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in padded)


def _spec(args, known: Backbone | None) -> Backbone:
    given = {key: getattr(args, key) for key in ("stem", "norm", "width") if getattr(args, key) is not None}
    if known:
        if args.backbone or given:
            raise ValueError(f"{args.target} names its backbone ({known.name}): leave out --backbone, --stem, --norm "
                             "and --width")  # fmt: skip
        return known
    if not args.backbone and args.features != "pixels":
        raise ValueError("bare weights do not say what they are: give --backbone NAME (and --stem, --norm, --width)")
    return Backbone(name=args.backbone or "resnet50", **given)


def _view(args, data: dict, spec: Backbone, card: dict) -> View:
    fields = data.get("eval_view") or (data["views"][0] if data else {"size": 32 if spec.stem == "cifar" else 224})
    view = View(**{key: value for key, value in fields.items() if key != "type"})
    changes = {key: getattr(args, key) for key in ("size", "mean", "std") if getattr(args, key) is not None}
    view = dataclasses.replace(view, **changes)
    if not data.get("eval_view"):
        view = views.default_view(view, card)
    return view if args.resize is None else dataclasses.replace(view, resize=args.resize or None)


def _backbone(args, spec: Backbone, view: View) -> tuple[nn.Module, object]:
    """The module and what to call it."""
    if args.features == "pixels":
        return features.Pixels(view.size), "normalised pixels"
    torch.manual_seed(args.seed)
    backbone = backbones.build(spec)
    if args.features == "untrained":
        return backbone, f"an untrained {spec.name}, seed {args.seed}"
    if args.target is None:
        raise ValueError("give a run folder or a weight file, or --features untrained or pixels")
    report = weights.load_backbone(args.target, backbone, prefix=args.prefix)
    return backbones.channels_last_(backbone), report


def _write(path: str, result: dict) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(path + ".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(temporary, path)


def _numbers(kind):
    def parse(text: str) -> tuple:
        try:
            return tuple(kind(part) for part in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no comma-separated list of numbers") from None

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("fastssl eval", description=__doc__.splitlines()[0], allow_abbrev=False)
    protocols = parser.add_subparsers(dest="protocol", required=True, metavar="knn|linear")
    for name in ("knn", "linear"):
        p = protocols.add_parser(name, allow_abbrev=False)
        p.add_argument("target", nargs="?", metavar="RUN_OR_WEIGHTS",
                       help="run folder, checkpoint folder, .safetensors, .pt or .pth")
        p.add_argument("--train", help=".beton of the bank or the training set; default: the run's")
        p.add_argument("--test", help=".beton to classify; default: the run's")
        p.add_argument("--features", choices=("weights", "untrained", "pixels"), default="weights",
                       help="the network's, or a baseline on the same images")
        p.add_argument("--out", help="write the result as JSON")
        p.add_argument("--prefix", help="where in the file the backbone lies, e.g. teacher.backbone.; default: found")
        p.add_argument("--backbone", metavar="NAME", help="for bare weights")
        p.add_argument("--stem", choices=("imagenet", "cifar"))
        p.add_argument("--norm", choices=("bn", "gn"))
        p.add_argument("--width", type=int)
        p.add_argument("--size", type=int, help="side of the centre crop")
        p.add_argument("--resize", type=int, help="short side before the crop, 0: none; default: by the images' sizes")
        p.add_argument("--mean", type=_numbers(float), help="R,G,B; default: the run's, else ImageNet's")
        p.add_argument("--std", type=_numbers(float))
        p.add_argument("--batch", type=int, default=256, help="images per rank and pass")
        p.add_argument("--workers", type=int, help="decoding threads per rank")
        p.add_argument("--precision", choices=tuple(DTYPES), default="fp32")
        p.add_argument("--device", help="cpu or cuda; default: cuda when there is one")
        p.add_argument("--seed", type=int, default=0)
    p = protocols.choices["knn"]
    p.add_argument("--k", type=_numbers(int), default=(10, 20, 100, 200))
    p.add_argument("--temperature", type=float, default=0.07)
    p.add_argument("--backend", choices=tuple(knn.SEARCH), default="torch")
    p = protocols.choices["linear"]
    p.add_argument("--solver", choices=("sgd", "lbfgs"), default="sgd")
    p.add_argument("--grid", type=_numbers(float), help="learning rates (sgd) or l2 penalties (lbfgs) to choose from")
    p.add_argument("--epochs", type=int, default=100, help="lbfgs: at most so many iterations")
    p.add_argument("--probe-batch", type=int, default=1024)
    p.add_argument("--held-out", type=float, default=0.1, help="share of the training set that chooses the setting")
    return parser
