"""Draw the times of one step's kernels by kind, from profiles: python bench/picture.py OUT.svg "TITLE=FILE" ...

FILE is the step.txt that `bench/step.py CONFIG --profile FOLDER` writes. A bar is one step, to scale: the times of its
kernels, summed by kind (not in the order in which they ran), and the time in which the device waits for the host. The
table in step.txt has the 40 largest entries; the others are "not in the table". --table prints the sums as Markdown.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

KINDS = {  # colour, and pattern of kernel names; the first one that matches counts
    "views": ("#17becf", r"^(whole|colour|blur|draw)_kernel"),
    "optimizer": ("#8c564b", r"lars_kernel|square_sums_kernel|multi_tensor_apply"),
    "attention": ("#9467bd", r"sdpa|compute_dot_do_o|convert_dq"),
    "batch norm": ("#1f77b4", r"batchnorm"),
    "layer norm": ("#1f77b4", r"layer_norm|GammaBeta"),
    "GELU": ("#e377c2", r"(?i)gelu"),
    # threshold_backward; launch_clamp_scalar
    "ReLU": ("#e377c2", r"BinaryFunctor<c10::Half|\(anonymous namespace\)::la"),
    "matrix products": ("#2ca02c", r"nvjet|_gemm_f32|splitKreduce"),
    "convolutions": ("#2ca02c", r"_xmma_|cudnn|cutlass|nhwcAddPadding"),
    "copies and casts": ("#ff7f0e", r"copy|Memcpy|Memset|memcpy|FillFunctor|CatArray|stack"),
    "adds and sums": ("#ffbb78", r"_add|_sum|reduce_kernel"),
    "other kernels": ("#bcbd22", r""),
}
COLOURS = {kind: colour for kind, (colour, _) in KINDS.items()}
COLOURS |= {"not in the table": "#c7c7c7", "waits for the host": "#f0f0f0"}
STEPS = 13  # of a profile, including the warm-up (bench/step.py)


def read(path: Path) -> tuple[float, dict[str, float]]:
    """Milliseconds of a step, and of the device by kind of kernel."""
    text = path.read_text()
    wall, busy = (float(re.findall(p, text)[0]) for p in (r"([\d.]+) ms a step", r"device (?:works|busy) ([\d.]+) ms"))
    kinds = dict.fromkeys(COLOURS, 0.0)
    for line in text.partition("Self CUDA time total")[0].splitlines():
        row = re.match(r"\s*(.+?)\s\s+.*?(\S+)\s+[\d.]+%\s+\S+\s+\S+\s+\d+\s*$", line)
        # operators are sums of their kernels; ranges and calls of the runtime are not kernels
        if row and not row[1].startswith(("aten::", "fastssl::", "Optimizer.", "cuda")):
            kinds[next(k for k, (_, pattern) in KINDS.items() if re.search(pattern, row[1]))] += _ms(row[2]) / STEPS
    kinds["not in the table"] = max(0.0, busy - sum(kinds.values()))
    kinds["waits for the host"] = max(0.0, wall - busy)
    return wall, kinds


def _ms(text: str) -> float:
    ((number, unit),) = re.findall(r"^([\d.]+)(us|ms|s)$", text)
    return float(number) * {"us": 1e-3, "ms": 1.0, "s": 1e3}[unit]


def draw(found: dict[str, tuple[float, dict[str, float]]], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "fastssl"  # the same bytes for the same profiles
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    figure, axes = pyplot.subplots(len(found), 1, figsize=(11, 1.25 * len(found) + 1.6), layout="constrained")
    ends = {title: max(wall, sum(kinds.values())) for title, (wall, kinds) in found.items()}
    scales = {short: max([end for end in ends.values() if (end <= 20) == short], default=0) for short in (True, False)}
    for axis, (title, (wall, kinds)) in zip([axes] if len(found) == 1 else axes, found.items()):
        left = 0.0
        for kind, ms in kinds.items():
            axis.barh(0, ms, left=left, color=COLOURS[kind], edgecolor="white", linewidth=0.8)
            if ms > 0.05 * sum(kinds.values()):
                axis.text(left + ms / 2, 0, f"{ms:.1f}", ha="center", va="center", fontsize=9)
            left += ms
        axis.set_title(f"{title}: {wall:.2f} ms a step", loc="left", fontsize=10)
        axis.set_xlim(0, scales[ends[title] <= 20])  # steps below 20 ms have another scale
        axis.set_yticks([])
        axis.spines[["top", "right", "left"]].set_visible(False)
    axis.set_xlabel("ms")
    named: dict[str, list[str]] = {}
    for kind, colour in COLOURS.items():
        if any(kinds[kind] for _, kinds in found.values()):
            named.setdefault(colour, []).append(kind)
    patches = [Patch(color=colour, label=" or ".join(names)) for colour, names in named.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None, dpi=110)


def table(found: dict[str, tuple[float, dict[str, float]]]) -> str:
    rows = ["| ms of a step | " + " | ".join(found) + " |", "|---|" + "---|" * len(found)]
    for kind in COLOURS:
        values = [kinds[kind] for _, kinds in found.values()]
        if any(values):
            rows.append(f"| {kind} | " + " | ".join(f"{v:.2f}" if v else "" for v in values) + " |")
    return "\n".join([*rows, "| the step | " + " | ".join(f"{wall:.2f}" for wall, _ in found.values()) + " |"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="an .svg or .png file")
    parser.add_argument("profiles", nargs="+", metavar="TITLE=FILE")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args(argv)
    found = {}
    for text in args.profiles:
        title, _, file = text.rpartition("=")
        try:
            found[title] = read(Path(file))
        except (OSError, IndexError) as error:  # no such file, or none of the lines of a step.txt
            print(
                f"bench/picture.py: {text!r} is not TITLE=FILE with a step.txt of bench/step.py --profile ({error})",
                file=sys.stderr,
            )
            return 2
    draw(found, args.out)
    if args.table:
        print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
