"""The report's tables: timings, evaluations, configuration and environment, one column for each run."""

from __future__ import annotations

import dataclasses
import json
from html import escape
from typing import Any

import numpy as np

from fastssl.eval import METRICS
from fastssl.kernels.views import View
from fastssl.report.runs import PHASES, RunData

NOT_SHOWN = {"picture", "path"}  # of a row of results: files beside it


Row = tuple[list[str], list[str], bool]


def table(heads: list[str], runs: list[RunData], rows: list[Row], code: bool = False) -> str:
    """rows: (HTML of the cells before the runs' cells, HTML of the runs' cells, whether they differ)."""
    top = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    top += "".join(f'<th scope="col" class="r{i}"><i class="swatch s{i}"></i> {escape(run.label)}</th>'
                   for i, run in enumerate(runs))  # fmt: skip
    kind = "code " if code else ""
    body = "".join(f'<tr{" class=differs" if differs else ""}>' + "".join(f'<th scope="row">{c}</th>' for c in first)
                   + "".join(f'<td class="{kind}r{i}">{c}</td>' for i, c in enumerate(cells)) + "</tr>"
                   for first, cells, differs in rows)  # fmt: skip
    return f'<div class="table"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def timings(timed: list[RunData], runs: list[RunData]) -> str:
    rows = []
    for name in (*PHASES, "total"):
        cells = []
        for run in runs:
            if run not in timed or f"{name}_ms" not in run.scalars:
                cells.append("")
                continue
            y, total = run.scalars[f"{name}_ms"][1], run.scalars["total_ms"][1]
            cells.append(f"{np.median(y):.1f} <small>{100 * y.sum() / total.sum():.0f} %</small>")
        rows.append(([("data wait" if name == "data" else name)], cells, False))
    return ('<p class="about">Median milliseconds of a step, and the share of the whole time.</p>'
            + table(["phase"], runs, rows))  # fmt: skip


# ---- evaluations -----------------------------------------------------------------------------------------------------


def weights_of(result: dict) -> str:
    of = result.get("of")
    return str(of.get("weights", "")) if isinstance(of, dict) else ""


def owner(runs: list[RunData], result: dict) -> RunData | None:
    """The run from whose checkpoints a result was computed, by the path that it carries."""
    said = weights_of(result)
    for run in runs:
        if any(f"{name}/checkpoints/" in said for name in (str(run.folder), str(run.folder.resolve()))):
            return run
    return None


def evaluations(runs: list[RunData]) -> str:
    if not any(run.evaluations for run in runs):
        return ('<p class="note">No results: write some into the run folder with fastssl eval knn RUN '
                "--out RUN/eval/knn.json, or name them with --eval.</p>")  # fmt: skip
    found: dict[tuple, dict[int, dict]] = {}  # place -> run -> row
    for i, run in enumerate(runs):
        seen: dict[tuple, int] = {}
        for file, result in run.evaluations:
            of = result.get("of") if isinstance(result.get("of"), dict) else {}
            place = (result["protocol"], str(of.get("features", "weights")), str(of.get("test")))
            seen[place] = seen.get(place, -1) + 1
            for j, row in enumerate(result["results"]):
                found.setdefault((*place, seen[place], j), {})[i] = {**row, "": (file, result)}
    rows = []
    for (protocol, features, *_), by_run in sorted(found.items(), key=lambda item: item[0]):
        keys = list(dict.fromkeys(k for row in by_run.values() for k in row if k and k not in METRICS))
        keys = [k for k in keys if k not in NOT_SHOWN]
        shared = [k for k in keys if len({repr(row.get(k)) for row in by_run.values()}) == 1]
        setting = [f"{k}={_short(next(iter(by_run.values()))[k])}" for k in shared if k != "selected_on"]
        setting += [f"features={features}"] if features != "weights" else []
        selected = {row.get("selected_on") for row in by_run.values()}
        badge = ' <span class="badge">selected on test data</span>' if "test" in selected else ""
        metrics = [m for m in METRICS if any(m in row for row in by_run.values())]
        for metric in metrics or [""]:
            cells = [_cell(by_run.get(i), metric, [k for k in keys if k not in shared]) for i in range(len(runs))]
            first = [escape(protocol), escape(" ".join(setting)) + badge, escape(METRICS.get(metric, ""))]
            rows.append((first, cells, False))
    return table(["protocol", "setting", "metric"], runs, rows)


def _cell(row: dict | None, metric: str, own: list[str]) -> str:
    if row is None:
        return "<small>none</small>"
    file, result = row[""]
    value = row.get(metric)
    text = f"<b>{value:.2f}</b>" if isinstance(value, (int, float)) else escape(str(value if value is not None else ""))
    more = " ".join(f"{k}={_short(row[k])}" for k in own if k in row)
    said = f"{file}: {json.dumps(result.get('options', {}))}"
    return f'<span title="{escape(said)}">{text}{f" <small>{escape(more)}</small>" if more else ""}</span>'


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


# ---- configuration and environment -----------------------------------------------------------------------------------


def configuration(runs: list[RunData]) -> str:
    if not any(run.config for run in runs):
        return '<p class="note">No run has a config.json that can be read.</p>'
    flat = [flatten(run.config) for run in runs]
    rows = []
    for key in dict.fromkeys(key for part in flat for key in part):
        values = [part.get(key) for part in flat]
        cells = ["" if v is None else escape(v) for v in values]
        rows.append(([f"<code>{escape(key)}</code>"], cells, len(runs) > 1 and len(set(values)) > 1 and key != "name"))
    lead = '<p class="about">Fields of views that have their default are left out.</p>'
    if len(runs) == 1:
        return lead + table(["setting"], runs, rows, code=True)
    differing = [row for row in rows if row[2]]
    top = (table(["setting that differs"], runs, differing, code=True) if differing
           else '<p class="lead">All settings are equal.</p>')  # fmt: skip
    everything = table(["setting"], runs, rows, code=True)
    return f"{top}<details><summary>All {len(rows)} settings</summary>{lead}{everything}</details>"


def flatten(value: Any, key: str = "") -> dict[str, str]:
    """Dotted keys -> JSON of the leaves; of views only what is not their default."""
    if isinstance(value, dict) and value:
        if str(value.get("type", "")).endswith(".View"):
            default = {f.name: f.default for f in dataclasses.fields(View)}
            value = {k: v for k, v in value.items()
                     if k != "type" and (tuple(v) if isinstance(v, list) else v) != default.get(k)}  # fmt: skip
        parts = [flatten(part, f"{key}.{name}" if key else name) for name, part in value.items()]
        return {k: v for part in parts for k, v in part.items()}
    if isinstance(value, list) and any(isinstance(part, dict) for part in value):
        return {k: v for i, part in enumerate(value) for k, v in flatten(part, f"{key}[{i}]").items()}
    return {key: value if isinstance(value, str) else json.dumps(value)}


def environment(runs: list[RunData]) -> str:
    out = []
    for run in runs:
        if not run.environment:
            out.append(f'<p class="note">{escape(run.label)}: environment.json is absent; runs of this version write '
                       "it at their start.</p>")  # fmt: skip
        elif len(run.environment) > 1:
            starts = "; ".join(f"step {e.get('step')}, {e.get('time')}, {e.get('ranks')} ranks, {e.get('device')}"
                               for e in run.environment)  # fmt: skip
            out.append(f'<p class="about">{escape(run.label)} was started {len(run.environment)} times: '
                       f"{escape(starts)}. The table has the last.</p>")  # fmt: skip
    last = [run.environment[-1] if run.environment else {} for run in runs]
    keys = [key for key in dict.fromkeys(k for part in last for k in part) if key != "step"]
    rows = []
    for key in keys:
        values = [str(part.get(key, "")) for part in last]
        differs = key != "time" and len(set(values)) > 1
        rows.append(([escape({"time": "started"}.get(key, key))], [escape(v) for v in values], differs))
    return "".join(out) + (table([""], runs, rows) if rows else "")
