"""Train and evaluate every method on CIFAR-10 and write the results to a table:  python bench/methods.py [METHOD ...]

Each run is `fastssl train configs/smoke/METHOD.py` (or configs/METHOD/*_SET.py), then `fastssl eval knn` of the trained
and of the untrained network on the whole training and test sets.  Finished runs are not repeated; `--table` writes the
results of all finished runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from common import ROOT, append, environment, parser_with_dry

from fastssl import config, methods
from fastssl.config import Run

K = 20


def main() -> None:
    parser = parser_with_dry(__doc__)
    parser.add_argument("methods", nargs="*", metavar="METHOD", default=methods.names())
    parser.add_argument("--set", default="smoke", help="smoke, or the ending of a config of each method: cifar10_200ep")
    parser.add_argument("--train", default="data/cifar10_train.beton")
    parser.add_argument("--test", default="data/cifar10_test.beton")
    parser.add_argument("--override", action="append", default=[], metavar="a.b=value", help="for every run")
    parser.add_argument("--table", type=Path, help="write the table between the marks in this file")
    args = parser.parse_args()
    env = environment("deepspeed", "ffcv")
    unknown = [name for name in args.methods if name not in methods.names()]
    if unknown:
        raise SystemExit(f"bench/methods.py: unknown method {unknown[0]!r}; choose from {', '.join(methods.names())}")
    results = []
    for name in methods.names():
        pattern = f"smoke/{name}.py" if args.set == "smoke" else f"{name}/*_{args.set}.py"
        file = next(iter(sorted((ROOT / "configs").glob(pattern))), None)
        if file is None:
            raise SystemExit(f"bench/methods.py: no configs/{pattern}; give --set smoke or, for example, cifar10_200ep")
        run = config.load(file, args.override)
        folder = Path(run.log.root) / run.name
        if name in args.methods and not (folder / "result.json").exists():
            measure(name, file, folder, run, args, env)
        if (folder / "result.json").exists():
            results.append(json.loads((folder / "result.json").read_text()))
    if args.table:
        write_table(args.table, args.set, results)


def measure(name: str, file: Path, folder: Path, run: Run, args: argparse.Namespace, env: dict) -> None:
    print(f"{name}: training", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    began = time.perf_counter()
    call("train", str(file), f"data.train={args.train}", *args.override)
    seconds = time.perf_counter() - began
    steps = [r for r in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if "loss" in r]
    tenth = max(1, len(steps) // 10)
    first, last = (sum(r["loss"] for r in part) / len(part) for part in (steps[:tenth], steps[-tenth:]))
    result = {
        "method": name,
        "config": str(file.relative_to(ROOT)),
        "overrides": args.override,
        "backbone": run.backbone.name + (f", width {run.backbone.width}" if run.backbone.width != 64 else ""),
        "batch": run.optim.batch,
        "steps": steps[-1]["step"],
        "train_s": round(seconds, 1),
        "loss_first": first,
        "loss_last": last,
        "knn_untrained": knn(folder, args, "untrained"),
        "knn": knn(folder, args, "weights"),
    }
    (folder / "result.json").write_text(json.dumps({**env, **result}, indent=1) + "\n")
    if not args.dry:
        append("methods", env, **result)
    print(
        f"{name}: loss {first:.3f} to {last:.3f}, kNN {result['knn']:.1f} % "
        f"(untrained {result['knn_untrained']:.1f} %), {seconds:.0f} s",
        flush=True,
    )


def knn(folder: Path, args: argparse.Namespace, features: str) -> float:
    out = folder / f"knn_{features}.json"
    options = {"train": args.train, "test": args.test, "k": K, "features": features, "out": out}
    call("eval", "knn", str(folder), *(f"--{name}={value}" for name, value in options.items()))
    return json.loads(out.read_text())["results"][0]["top1"]


def write_table(path: Path, name: str, results: list[dict]) -> None:
    """Replace the text between `<!-- NAME: begin -->` and `<!-- NAME: end -->`."""
    rows = [
        "| method | backbone | steps x batch | loss, first to last tenth | kNN untrained | kNN trained | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results:
        rows.append(
            f"| {r['method']} | {r['backbone']} | {r['steps']} x {r['batch']} | {r['loss_first']:.3f}, "
            f"{r['loss_last']:.3f} | {r['knn_untrained']:.1f} | **{r['knn']:.1f}** | {r['train_s']:.0f} |"
        )
    made = sorted({(r["device"], r["date"], *(f"{k} {v}" for k, v in r["versions"].items())) for r in results})
    rows += ["", *(f"Measured on {device}, {date}, {', '.join(versions)}." for device, date, *versions in made)]
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    head, rest = path.read_text().split(begin)
    path.write_text(head + "\n".join([begin, *rows, end]) + rest.split(end)[1])


def call(*argv: str) -> None:
    done = subprocess.run([sys.executable, "-m", "fastssl", *argv], capture_output=True, text=True, env=os.environ)
    if done.returncode:
        end = (done.stdout + done.stderr)[-3000:]
        raise SystemExit(f"fastssl {' '.join(argv)} ended with {done.returncode}:\n{end}")


if __name__ == "__main__":
    main()
