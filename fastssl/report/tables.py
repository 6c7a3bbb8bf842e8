"""The report's tables: timings, evaluations, configuration and environment, one column for each run."""

from __future__ import annotations

import dataclasses
import importlib
import json
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from fastssl import methods
from fastssl.bottleneck import SKIPPED_STEPS
from fastssl.config import Run, dump
from fastssl.eval import METRICS, PROTOCOLS
from fastssl.kernels.augment import View
from fastssl.log.records import PHASES
from fastssl.parsing import settings_text
from fastssl.report.charts import about, note
from fastssl.report.run_data import RunData

HIDDEN = {"picture", "path", "selected_on", ""}  # keys of a row of results that are not part of its setting
VIEW = {f.name: f.default for f in dataclasses.fields(View) if f.default is not dataclasses.MISSING}
SPREAD = {"map_std", "map_min", "map_max"}  # of METRICS: the spread over draws, which has no best value


Row = tuple[list[str], list[str], bool]


def table(heads: list[str], runs: list[RunData], rows: list[Row], code: bool = False) -> str:
    """rows: (HTML of the row's headings, HTML of each run's cell, whether the runs differ)."""
    top = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    top += "".join(
        f'<th scope="col" class="r{i}"><i class="swatch s{i}"></i> {escape(run.label)}</th>'
        for i, run in enumerate(runs)
    )
    kind = "code " if code else ""
    body = "".join(
        f"<tr{' class=differs' if differs else ''}>"
        + "".join(f'<th scope="row">{c}</th>' for c in first)
        + "".join(f'<td class="{kind}r{i}">{c}</td>' for i, c in enumerate(cells))
        + "</tr>"
        for first, cells, differs in rows
    )
    return f'<div class="table"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def timings(runs: list[RunData]) -> str:
    """Of the steps that the summary of a training counts, or of all in a shorter run."""

    def times(run: RunData, name: str) -> np.ndarray:
        y = run.scalars[f"{name}_ms"][1] if f"{name}_ms" in run.scalars else np.zeros(0)
        return y[SKIPPED_STEPS:] if len(y) > SKIPPED_STEPS else y

    rows = []
    for name in (*PHASES, "total"):
        if not any(times(run, name).any() for run in runs):
            continue  # "step" without a CUDA graph
        cells = []
        for run in runs:
            y, total = times(run, name), times(run, "total").sum()
            cells.append(f"{np.median(y):.1f} <small>{100 * y.sum() / total:.0f} %</small>" if len(y) and total else "")
        rows.append(([("data wait" if name == "data" else name)], cells, False))
    lead = f"Median milliseconds of a step, and percent of the total time, without the first {SKIPPED_STEPS} steps."
    return about(lead) + table(["phase"], runs, rows)


def evaluated(result: dict) -> dict:
    """What a result says that it was computed from."""
    return of if isinstance(of := result.get("of"), dict) else {}


def weights_of(result: dict) -> str:
    return str(evaluated(result).get("weights", ""))


def owner(runs: list[RunData], result: dict) -> RunData | None:
    """The run from whose checkpoints a result was computed, by the path in it; None: another run."""

    def made(run: RunData) -> bool:
        return any(f"{folder}/checkpoints/" in weights_of(result) for folder in (run.folder, run.folder.resolve()))

    return next(filter(made, runs), None)


def evaluations(runs: list[RunData]) -> str:
    """A row for each metric of each protocol and test file; the best of all runs and settings in it is marked."""
    found: dict[tuple, dict[int, list[dict]]] = {}  # (protocol, features, test file) -> run -> rows
    for i, run in enumerate(runs):
        for file, result in run.evaluations:
            of = evaluated(result)
            key = result["protocol"], str(of.get("features", "weights")), str(of.get("test") or "")
            source = f"{file}: {json.dumps(result.get('options', {}))}"
            rows = [{**row, "": source} for row in result["results"] if METRICS.keys() & row.keys()]
            if rows:  # not of `extract`, which measures nothing
                found.setdefault(key, {}).setdefault(i, []).extend(rows)
    if not found:
        return note("No results: fastssl eval knn RUN writes its into the run folder; --eval names files elsewhere.")
    order = list(PROTOCOLS)

    def rank(key: tuple[str, str, str]) -> tuple:
        protocol, features, test = key
        position = order.index(protocol) if protocol in order else len(order)
        return position, protocol, test, features != "weights", features

    lines: list[tuple[list[str], list[str], bool]] = []
    for key in sorted(found, key=rank):
        protocol, features, test = key
        by_run = found[key]
        all_rows = [row for part in by_run.values() for row in part]
        what = {"weights": "", "untrained": "untrained network", "pixels": "pixels"}.get(features, features)
        first = escape(protocol) + (f"<small>{escape(Path(test).name)}</small>" if test else "")
        first += f'<span class="badge base">baseline: {escape(what)}</span>' if what else ""
        for metric in [m for m in METRICS if any(m in row for row in all_rows)]:
            values = [row[metric] for row in all_rows if is_number(row.get(metric))]
            best = max(values) if len(values) > 1 and metric not in SPREAD else None
            cells = [_cell(by_run.get(i, []), metric, best) for i in range(len(runs))]
            lines.append(([first, escape(METRICS[metric])], cells, False))
    marked = '<p class="about">The <b class="best">best</b> of a row is marked; the setting is above each figure.</p>'
    return marked + table(["protocol, test file", "metric"], runs, lines)


def _cell(rows: list[dict], metric: str, best: float | None) -> str:
    out = []
    for row in rows:
        value = row.get(metric)
        if value is None:
            continue
        setting = settings_text({k: v for k, v in row.items() if k not in METRICS and k not in HIDDEN})
        badge = ' <span class="badge">selected on test data</span>' if row.get("selected_on") == "test" else ""
        chosen = " (selected on held-out data)" if row.get("selected_on") == "held-out" else ""
        text = f"{value:.2f}" if is_number(value) else escape(str(value))
        kind = ' class="best"' if is_number(value) and value == best else ""
        out.append(
            f'<span class="value" title="{escape(row[""])}"><small>{escape(setting + chosen)}</small>'
            f"<b{kind}>{text}</b>{badge}</span>"
        )
    return "".join(out) or "<small>none</small>"


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def configuration(runs: list[RunData]) -> str:
    if not any(run.config for run in runs):
        return note("No run has a config.json that can be read.")
    flat, default = [flatten(run.config) for run in runs], [defaults(run.config) for run in runs]
    rows = []
    for key in dict.fromkeys(key for part in flat for key in part):
        values = [part.get(key, own.get(key)) if run.config else None for part, own, run in zip(flat, default, runs)]
        cells = [
            f'<span class="default" title="the default">{escape(v)}</span>'
            if v and own.get(key) == v
            else escape(v or "")
            for v, own in zip(values, default)
        ]
        rows.append(([f"<code>{escape(key)}</code>"], cells, len(runs) > 1 and len(set(values)) > 1 and key != "name"))
    gray = '<p class="about">Gray: the default.'
    lead = f"{gray} Fields of views that have it in all runs are left out.</p>"
    if len(runs) == 1:
        return lead + table(["setting"], runs, rows, code=True)
    differing = [row for row in rows if row[2]]
    top = '<p class="lead">All settings are equal.</p>'
    if differing:
        top = f"{gray}</p>" + table(["setting that differs"], runs, differing, code=True)
    everything = table(["setting"], runs, rows, code=True)
    return f"{top}<details><summary>All {len(rows)} settings</summary>{lead}{everything}</details>"


def defaults(config: dict) -> dict[str, str]:
    """The default settings, flattened.  Methods outside this package are left out: a config.json may come from
    anywhere, and no module that it names is imported."""
    method = config.get("method")
    kind = str(method.get("type", "")) if isinstance(method, dict) else ""
    out = flatten({k: v for k, v in dump(Run(method=None)).items() if k != "method"})
    if kind in {f"fastssl.methods.{name}.Config" for name in methods.names()}:
        given = dump(importlib.import_module(kind.rpartition(".")[0]).Config())
        out |= flatten({k: v for k, v in given.items() if k != "type"}, "method")
    views = config.get("data", {}).get("views") if isinstance(config.get("data"), dict) else None
    for i in range(len(views) if isinstance(views, list) else 0):
        out |= flatten(VIEW, f"data.views[{i}]")
    return out


def flatten(value: Any, key: str = "") -> dict[str, str]:
    """Dotted keys -> JSON of the leaves; of views only what differs from their defaults."""
    if isinstance(value, dict) and value:
        if str(value.get("type", "")).endswith(".View"):
            fields = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items() if k != "type"}
            value = {k: value[k] for k, v in fields.items() if v != VIEW.get(k)}
        parts = [flatten(part, f"{key}.{name}" if key else name) for name, part in value.items()]
        return {k: v for part in parts for k, v in part.items()}
    if isinstance(value, list) and any(isinstance(part, dict) for part in value):
        return {k: v for i, part in enumerate(value) for k, v in flatten(part, f"{key}[{i}]").items()}
    return {key: value if isinstance(value, str) else json.dumps(value)}


def environment(runs: list[RunData]) -> str:
    out = []
    for run in runs:
        if not run.environment:
            out.append(note(f"{run.label}: environment.json is absent; runs of this version write it when they start."))
        elif len(run.environment) > 1:
            starts = "; ".join(
                f"step {e.get('step')}, {e.get('time')}, {e.get('ranks')} ranks, {e.get('device')}"
                for e in run.environment
            )
            count = f"{run.label} was started {len(run.environment)} times"
            out.append(about(f"{count}: {starts}. The table has the last."))
    last = [run.environment[-1] if run.environment else {} for run in runs]
    keys = [key for key in dict.fromkeys(k for part in last for k in part) if key != "step"]
    rows = []
    for key in keys:
        values = [str(part.get(key, "")) for part in last]
        differs = key != "time" and len(set(values)) > 1
        rows.append(([escape({"time": "started"}.get(key, key))], [escape(v) for v in values], differs))
    return "".join(out) + (table([""], runs, rows) if rows else "")
