"""`fastssl eval PROTOCOL`: evaluates a run or a weight file, prints the result as a table and writes it as JSON.

Each protocol is a module or a folder here; what several of them use is in common/.  A protocol has
- its own options in options.py;
- `NEEDS`: which of "train" and "test" it reads, None where it reads no .beton;
- `run(target, args)`: returns {"protocol": name, "options": {...}, "results": [row, ...]};
- optionally `LABELLED`: which images must have a label (default "all", see common/classes.py).
"""

from __future__ import annotations

import argparse
import importlib
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from fastssl import files
from fastssl.parsing import columns, did_you_mean, run_command, settings_text

if TYPE_CHECKING:
    from fastssl.eval.common.target import EvalTarget

# torch and timm (4 s) are imported where they are used: `fastssl eval --help` and the report's tables need neither.
PROTOCOLS = {  # name: what it measures
    "knn": "weighted k nearest neighbours on frozen features",
    "linear": "a linear classifier on frozen features: our probe, MoCo's, OpenSelfSup's five layers, Places205, LARS",
    "classifier": "the classifier that a supervised run has trained",
    "extract": "features of each layer as .npy or .safetensors",
    "svm": "VOC07's linear SVMs on frozen features, or on few images a class",
    "semisup": "fine-tuning on 1 % or 10 % of the labels",
    "finetune": "fine-tuning on all labels",
    "detection": "fine-tuning of Faster R-CNN on VOC or COCO",
    "maps": "pictures of the features in two dimensions: pca, tsne, umap",
    "neighbours": "a sheet of images with their nearest neighbours",
}
METRICS = {  # key of a row: heading; the other keys of a row are its setting
    "top1": "top-1 %",
    "top5": "top-5 %",
    "map": "mAP %",
    "cv_map": "mAP % by CV",
    "map_std": "std",
    "map_min": "min",
    "map_max": "max",
    "ap": "AP %",
    "ap50": "AP50 %",
    "ap75": "AP75 %",
    "precision": "precision %",
    "trustworthiness": "trust %",
}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: fastssl eval PROTOCOL [RUN_OR_WEIGHTS] ...  (fastssl eval PROTOCOL --help)\n")
        print("\n".join(f"  {name:<12}{what}" for name, what in PROTOCOLS.items()))
        return 0 if argv else 2
    if argv[0] not in PROTOCOLS:
        meant = did_you_mean(argv[0], PROTOCOLS) or f"; known are {', '.join(PROTOCOLS)}"
        print(f"fastssl eval: unknown protocol {argv[0]!r}{meant}", file=sys.stderr)
        return 2
    from fastssl.eval import options  # late, because it needs fastssl.config

    args = options.parser(argv[0]).parse_args(argv[1:])
    from fastssl import dist

    protocol = importlib.import_module(f"fastssl.eval.{argv[0]}")

    def work() -> None:
        args.device = dist.init(args.device)
        result = run(protocol, args)
        if dist.is_main():
            print(table([result]))
            if args.out:
                files.write_json(args.out, result)
                print(f"saved as {args.out}")
        dist.barrier()

    try:
        return run_command("eval", work)
    finally:
        dist.shutdown()


def run(protocol: ModuleType, args: argparse.Namespace) -> dict:
    """The protocol's result and what was evaluated; sets `args.out` to the default where it is None."""
    from fastssl import dist
    from fastssl.eval.common.target import load_target

    target = load_target(args, protocol.NEEDS, getattr(protocol, "LABELLED", "all"))
    args.out = args.out or default_out(target, protocol.__name__.rpartition(".")[2], args)
    dist.print_main(f"evaluating {target.weights}")
    result = protocol.run(target, args)
    return {**result, "of": target.describe(), "fastssl": version("fastssl")}


def default_out(target: EvalTarget, name: str, args: argparse.Namespace) -> str | None:
    """eval/PROTOCOL.json in the run's folder, with options that differ from their defaults in the file name, so that
    only an evaluation of the same kind replaces it; None for a weight file."""
    folder = target.run_folder()
    if folder is None or target.run is None:
        return None
    recipe = getattr(args, "recipe", None)
    path, data = Path(args.target), target.run["data"]
    percent, subset = getattr(args, "percent", None), getattr(args, "subset", None)
    parts = [
        name,
        recipe if recipe != "probe" else None,
        "low_shot" if getattr(args, "low_shot", False) else None,
        f"{percent:g}percent" if percent else None,
        Path(subset).stem if subset not in (None, "all") else None,
        "coco" if getattr(args, "coco", None) else None,
        args.features if args.features != "weights" else None,
        args.which,
        path.name if path.resolve() != folder.resolve() else None,
        Path(args.train).stem if args.train not in (None, data.get("bank") or data.get("train")) else None,
        Path(args.test).stem if args.test not in (None, data.get("test")) else None,
    ]
    return str(folder / "eval" / ("-".join(filter(None, parts)) + ".json"))


def table(results: list[dict]) -> str:
    """Results of any protocols as a table: a line for each row, with its setting and its metrics."""
    lines = [(result, row) for result in results for row in result["results"]]
    used = [key for key in METRICS if any(key in row for _, row in lines)]
    rows = [["protocol", "setting", *(METRICS[key] for key in used)]]
    for result, row in lines:
        setting = settings_text({key: value for key, value in row.items() if key not in METRICS})
        rows.append([result["protocol"], setting, *(f"{row[key]:.2f}" if key in row else "" for key in used)])
    return columns(rows, left=2)
