"""Options of commands whose modules import torch, in a file without it, so that --help and errors in options take no
seconds.  Those of `fastssl eval` are in eval/options.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fastssl.config.backbone_options import add_backbone_options
from fastssl.parsing import Parser, docstring, existing

EXPORT_TARGETS = ("torchvision", "timm", "safetensors", "detectron2", "huggingface")
FOLDER = Path(__file__).parent


def parse(command: str, argv: list[str] | None) -> argparse.Namespace:
    """The arguments of `fastssl COMMAND`, one of COMMANDS."""
    parser = COMMANDS[command]()
    return parser.parse_intermixed_args(argv) if command == "params" else parser.parse_args(argv)


def _quickstart() -> Parser:
    parser = Parser(
        "fastssl quickstart", description="Convert, pretrain and evaluate scikit-learn's digits, without a download."
    )
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="as for fastssl train")
    return parser


def _params() -> Parser:
    parser = Parser("fastssl params", description="Count the parameters of a network and its FLOPs.")
    parser.add_argument("target", metavar="CONFIG|BACKBONE", help="a config file, or a name such as resnet50")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings that replace those of the config")
    parser.add_argument("--size", type=int, help="side of the images; default: the config's views, or the network's")
    parser.add_argument("--samples", type=int, help="some methods hold a bank; default: the data card's, or ImageNet's")
    add_backbone_options(parser, name=False)
    return parser


def _report() -> Parser:
    parser = Parser("fastssl report", docstring(FOLDER / "report" / "__init__.py"))
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, below work_dirs/")
    parser.add_argument("--out", default="report.html", metavar="FILE", help="the page")
    parser.add_argument(
        "--eval", nargs="+", default=[], metavar="FILE", help="results of fastssl eval --out in other folders"
    )
    parser.add_argument("--train", help=".beton for the views; default: each run's")
    parser.add_argument("--test", help=".beton for neighbours and maps; default: each run's")
    parser.add_argument(
        "--points", type=int, default=1000, help="images on the map and in the search for neighbours; 0: no pictures"
    )
    parser.add_argument("--batch", type=int, default=64, help="images per pass")
    parser.add_argument("--workers", type=int, help="decoding threads; default: one for each core")
    parser.add_argument("--device", help="cpu or cuda; default: cuda when there is one")
    return parser


def _export() -> Parser:
    parser = Parser("fastssl export", description="Write a backbone for other tools.")
    about = "run or checkpoint folder, .safetensors, .pt or .pth"
    parser.add_argument("run", type=existing, metavar="RUN_OR_WEIGHTS", help=about)
    parser.add_argument("--to", choices=EXPORT_TARGETS, help="default: torchvision for a ResNet, timm for any other")
    parser.add_argument("--out", help="default: backbone.pth, backbone.safetensors, ... in the run's folder")
    parser.add_argument(
        "--which",
        choices=("student", "teacher"),
        help="the trained network or its moving average; default: what the method evaluates",
    )
    parser.add_argument("--prefix", help="another copy in the file, e.g. target.0.")
    add_backbone_options(parser)
    return parser


def _publish() -> Parser:
    about = "Write a run's weights, without the optimizer, to a file that has the beginning of its SHA-256 in its name."
    parser = Parser("fastssl publish", description=about)
    about = "run or checkpoint folder, .safetensors, .pt or .pth"
    parser.add_argument("source", type=existing, metavar="RUN_OR_FILE", help=about)
    parser.add_argument("--out", metavar="FOLDER", help="default: where the source is")
    parser.add_argument("--name", help="default: the run's or the file's")
    return parser


def _upgrade() -> Parser:
    parser = Parser("fastssl upgrade", description="Rewrite an old flat state dict in the current format.")
    parser.add_argument("old", type=existing)
    parser.add_argument("new", help=".safetensors, or .pth for {'state_dict': ...}")
    add_backbone_options(parser)
    return parser


COMMANDS = {
    "quickstart": _quickstart,
    "params": _params,
    "report": _report,
    "export": _export,
    "publish": _publish,
    "upgrade": _upgrade,
}
