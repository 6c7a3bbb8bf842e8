"""`fastssl report RUN [RUN...]`: one HTML page of one or several runs, side by side, which opens without a network.

It is made from the run folders: log.jsonl, config.json, environment.json, checkpoints and evaluations (*.json and
eval/*.json).  Where a part cannot be made, the page gives the reason in its place.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import platform
import time
from collections.abc import Callable
from functools import partial
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from fastssl import dist, files, options
from fastssl.log.records import PHASES, TIMING_KEYS
from fastssl.parsing import run_command
from fastssl.report import cards, run_data, tables
from fastssl.report.charts import Line, about, label, legend, line_chart, note, stacked_chart
from fastssl.report.run_data import CURVES, HINTS, MAIN, RunData

T = TypeVar("T")

MAX_RUNS = 8  # more colours could not be distinguished
HERE = Path(__file__).parent


def main(argv: list[str] | None = None) -> int:
    args = options.parse("report", argv)

    def work() -> None:
        runs = load(args)
        args.device = dist.init(args.device) if args.points else None
        page, out = render(runs, args), Path(args.out)
        with files.atomic_write(out) as temporary:
            temporary.write_text(page, encoding="utf-8", errors="replace")
        for run in runs:
            for text in run.notes:
                print(f"{run.label}: {text}")
        print(f"{out} ({out.stat().st_size / 2**20:.1f} MB): {', '.join(run.label for run in runs)}")

    try:
        return run_command("report", work)
    finally:
        dist.shutdown()


def load(args: argparse.Namespace) -> list[RunData]:
    if len(args.runs) > MAX_RUNS:
        raise ValueError(f"{len(args.runs)} runs: a page has at most {MAX_RUNS}, whose colours can be distinguished")
    if args.points < 0 or 0 < args.points < 5:
        raise ValueError(f"points={args.points}: a map needs 5 or more images; 0 leaves the pictures out")
    same = {str(Path(folder).resolve()) for folder in args.runs}
    if len(same) < len(args.runs):
        raise ValueError(f"a run is named twice: {' '.join(args.runs)}")
    runs = [run_data.read(folder) for folder in args.runs]
    run_data.name_runs(runs)
    for file in args.eval:
        try:
            result = run_data.sanitize(json.loads(Path(file).read_text()))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"--eval {file}: is not JSON ({error})") from None
        if not run_data.is_evaluation(result):
            raise ValueError(f"--eval {file}: is not a result of fastssl eval --out (it has no protocol and results)")
        owner = tables.owner(runs, result)
        if owner is None:
            weights = tables.weights_of(result) or "weights without a name"
            raise ValueError(f"--eval {file}: was computed from {weights}, which belong to none of these runs")
        if all(Path(known).resolve() != Path(file).resolve() for known, _ in owner.evaluations):
            owner.evaluations.append((file, result))
    return runs


def render(runs: list[RunData], args: argparse.Namespace) -> str:
    sections, baselines = [("Training", training(runs)), ("Speed", speed(runs))], [""] * len(runs)
    if args.points:
        shown, baselines = pictures(runs, args)
        sections += shown
    sections += [
        ("Evaluations", tables.evaluations(runs)),
        ("Configuration", tables.configuration(runs)),
        ("Environment", tables.environment(runs)),
    ]
    script, style = ((HERE / name).read_text() for name in ("page.js", "page.css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    title = runs[0].label if len(runs) == 1 else f"{len(runs)} runs"
    anchors = {name: name.lower().replace(" ", "-") for name, _ in sections}
    body = "".join(f'<section id="{anchors[name]}"><h2>{name}</h2>{text}</section>' for name, text in sections)
    links = "".join(f'<a href="#{anchor}">{name}</a>' for name, anchor in anchors.items())
    toggles = [
        f'<label class="s{i}"><input type="checkbox" checked data-run="{i}"><i class="swatch"></i>'
        f"{escape(run.label)}</label>"
        for i, run in enumerate(runs)
        if len(runs) > 1
    ]
    date = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    # The policy allows only page.js and no requests, even if the name of a run contains HTML.
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; \
script-src 'sha256-{digest}'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)} - fastssl report</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<header><h1>{escape(title)}</h1><p class="meta">fastssl report, {date}</p></header>
<div class="bar"><div><nav aria-label="Sections">{links}</nav>\
<div class="toggles" role="group" aria-label="Shown runs">{"".join(toggles)}</div></div></div>
<main><section id="summary"><h2>Summary</h2>{cards.summary(runs, baselines)}</section>{body}</main>
<footer>Made with fastssl {version("fastssl")}, Python {platform.python_version()}, torch {version("torch")}.</footer>
<div id="tip" role="status" hidden></div>
<script>{script}</script>
</body>
</html>
"""


def lines_of(runs: list[RunData], key: str, factor: float = 1.0, weight: str | None = None) -> tuple[list[Line], str]:
    """The runs' curves and the name of the x axis: epochs, or steps if one of the runs is in its first epoch."""
    logged = [(i, run) for i, run in enumerate(runs) if key in run.scalars]
    epochs = all(run.steps_per_epoch for _, run in logged)
    out = []
    for i, run in logged:
        x, y, low, high = run_data.binned(run, key, weight=weight)
        band = (None, None) if weight else (factor * low, factor * high)
        out.append(Line(run.label, i, x * (run.x_per_step if epochs else 1.0), factor * y, *band))
    return out, "epoch" if epochs else "step"


def training(runs: list[RunData]) -> str:
    keys = dict.fromkeys([*CURVES, *(key for run in runs for key in run.scalars if key not in TIMING_KEYS)])
    figures, constant, missing = [], [], []
    for key in keys:
        lines, x_label = lines_of(runs, key)
        if not lines:
            if key in MAIN:
                missing.append(note(f"{CURVES[key][0]}: no run has logged it{HINTS.get(key, '')}."))
            continue
        values = {v for line in lines for v in line.range}
        if len(values) == 1 and key not in CURVES:
            constant.append(f"{key} = {label(values.pop())}")
            continue
        title, unit, text = CURVES.get(key, (key, "", ""))
        absent = [run.label for run in runs if key not in run.scalars] if key in MAIN else []
        text += f" Not logged by {', '.join(absent)}." if absent else ""
        figures.append(line_chart(title, lines, x_label=x_label, unit=unit, text=text))
    same = about(f"Constant: {'; '.join(constant)}.") if constant else ""
    binned = any(len(x) > 400 for run in runs for x, _ in run.scalars.values())
    lead = "Each point is the mean of an interval of steps, the pale band its smallest and largest value."
    lead = lead if binned else "Every logged value."
    charts = f'<div class="charts">{"".join(figures)}</div>'
    return f'<p class="lead">{lead}</p>{_legend(runs)}{"".join(missing)}{charts}{same}'


def speed(runs: list[RunData]) -> str:
    out, timed = [], [run for run in runs if "total_ms" in run.scalars]
    if not timed:
        return note("No step has been timed yet.")
    for key, title, unit, factor in (
        ("images_per_s", "Throughput", "images/s", 1.0),
        ("mfu", "MFU", "%", 100.0),
        ("memory_gib", "Memory", "GiB", 1.0),
    ):
        lines, x_label = lines_of(runs, key, factor, "total_ms")
        if lines:
            out.append(line_chart(title, lines, x_label=x_label, unit=unit))
    unknown = ", ".join(run.label for run in runs if "mfu" not in run.scalars and not run.on_cpu)
    text = f"MFU of {unknown}: not known; it needs a GPU whose peak FLOP/s are listed in fastssl/meters.py."
    notes = note(text) if unknown else ""
    phases = []
    for i, run in enumerate(runs):
        if run in timed:
            x, percent = run_data.time_per_phase(run)
            title, x_label = f"Phases of the step: {run.label}", "epoch" if run.steps_per_epoch else "step"
            phases.append(stacked_chart(title, i, x * run.x_per_step, percent, PHASES, x_label=x_label))
    names = ("data wait", *PHASES[1:])
    parts = legend([(f"p{i}", name) for i, name in enumerate(names)])
    return (
        f'{_legend(runs)}{notes}<div class="charts">{"".join(out)}</div><h3>Where the time of a step goes</h3>'
        f'<p class="about">other: hooks, logging, evaluations and checkpoints between two steps.</p>{parts}'
        f'<div class="charts">{"".join(phases)}</div>{tables.timings(runs)}'
    )


def _legend(runs: list[RunData]) -> str:
    return legend([(f"s{i}", run.label) for i, run in enumerate(runs)]) if len(runs) > 1 else ""


def pictures(runs: list[RunData], args: argparse.Namespace) -> tuple[list[tuple[str, str]], list[str]]:
    """Views, neighbours and maps of each run, or the reason for their absence; and the baselines of each run."""
    parts: dict[str, list[str]] = {"Views": [], "Nearest neighbours": [], "Embedding map": []}
    baselines = []
    for i, run in enumerate(runs):
        *figures, compared = _pictures_of(run, args)
        baselines.append(compared)
        for name, html in zip(parts, figures):
            title = f'<h3><i class="swatch"></i>{escape(run.label)}</h3>'
            parts[name].append(f'<div class="run s{i} r{i}">{title}{html}</div>')
    return [(name, f'<div class="runs">{"".join(text)}</div>') for name, text in parts.items()], baselines


def _pictures_of(run: RunData, args: argparse.Namespace) -> tuple[str, str, str, str]:
    """Views, neighbours, maps and baselines of a run; where one cannot be made, the reason in its place."""
    from fastssl.report import samples

    features, reason = _try(lambda: samples.Features(run, args) if run_data.has_checkpoint(run) else None)
    views, failed = _try(lambda: samples.views(run, args))
    if features is None:
        reason = reason or note("there is no complete checkpoint: features need one")
        return views or failed, reason, reason, ""

    def of(part: Callable[[], str]) -> str:
        html, failed = _try(part)
        return html or failed

    maps = f'<div class="charts">{of(partial(features.map, "pca"))}{of(partial(features.map, "tsne"))}</div>'
    groups = features.groups()
    key = legend([(colour, name) for name, colour, _ in groups]) if groups else ""
    return views or failed, of(features.neighbours), key + maps, of(features.baselines)


def _try(part: Callable[[], T]) -> tuple[T, str] | tuple[None, str]:
    """(what it returns, ""), or (None, the reason).  The page is written even if a part fails: damaged files, an
    architecture of another version, too little memory."""
    try:
        return part(), ""
    except Exception as error:
        return None, note(f"not made: {error if isinstance(error, (ValueError, OSError)) else repr(error)}")
