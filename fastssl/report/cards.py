"""The report's first section: for each run the method, network, data and length, the results beside the baselines, and
whether the run collapsed."""

from __future__ import annotations

from html import escape
from pathlib import Path

import numpy as np

from fastssl.files.datacard import DataCard
from fastssl.log.records import COLLAPSE_LIMITS
from fastssl.report import run_data
from fastssl.report.charts import about, duration, note
from fastssl.report.run_data import CURVES, MAIN, RunData


def summary(runs: list[RunData], baselines: list[str]) -> str:
    """`baselines`: HTML of each run's comparison with untrained network, pixels and chance, or an empty string."""
    cards = []
    for i, run in enumerate(runs):
        listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts(run))
        figures = "".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(value)} <small>{escape(more)}</small></dd></div>"
            for name, value, more in key_figures(run)
        )
        notes = "".join(map(note, run.notes))
        warning = collapse(run)
        bad = f'<p class="note bad"><b>Collapsed.</b> {escape(warning)}</p>' if warning else ""
        cards.append(
            f'<article class="card s{i} r{i}"><h3>{escape(run.label)}</h3><p class="meta">{escape(run.status)}'
            f'</p><dl class="facts">{listed}</dl>{bad}<dl class="tiles">{figures}</dl>{baselines[i]}{notes}'
            "</article>"
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def facts(run: RunData) -> list[tuple[str, str]]:
    """(name, text): method, network, data, views, length and machine, as far as the run's files have them."""
    method = str(run.setting("method.type", ""))
    network = [str(run.setting("backbone.name", ""))]
    network += [
        f"{key} {run.setting(f'backbone.{key}')}"
        for key, default in (("stem", "imagenet"), ("width", 64), ("norm", "bn"), ("pretrained", None))
        if run.setting(f"backbone.{key}") not in (None, default)
    ]
    out = [
        ("Method", method.split(".")[-2] if method.startswith("fastssl.methods.") else method.split(".")[-1]),
        ("Network", ", ".join(network)),
        ("Data", _data(run, "train")),
        ("Tested on", _data(run, "test")),
        ("Views", _views(run)),
        ("Length", _length(run)),
        ("Machine", _machine(run)),
    ]
    return [(name, text) for name, text in out if text]


def _data(run: RunData, which: str) -> str:
    path = run.setting(f"data.{which}")
    if not isinstance(path, str) or not path:
        return ""
    try:
        card = DataCard.read(path)
    except ValueError:  # the data may be elsewhere by now
        return Path(path).name
    known = [f"{card.samples:,} images"] + ([f"{len(card.classes):,} classes"] if card.classes else [])
    return f"{Path(path).name} ({', '.join(known)})"


def _views(run: RunData) -> str:
    views = run.setting("data.views", ())
    sizes = [str(view.get("size")) for view in views if isinstance(view, dict)] if isinstance(views, list) else []
    each = [f"{sizes.count(size)} of {size} x {size} pixels" for size in dict.fromkeys(sizes)]
    return ", ".join(each)


def _length(run: RunData) -> str:
    batch, epochs = run.number("optim.batch"), run.number("optim.epochs")
    out = [f"{run.steps / run.steps_per_epoch:.3g} epochs"] if run.steps_per_epoch else []
    if run.setting("optim.steps") is None and epochs and run.steps_per_epoch:
        out = [f"{out[0].removesuffix(' epochs')} of {epochs:g} epochs"]
    if run.steps:
        out.append(f"{run.steps:,} steps" + (f" of {batch:,.0f} images" if batch else ""))
    if "total_ms" in run.scalars:
        out.append(duration(run.scalars["total_ms"][1].sum() / 1e3))
    return ", ".join(out)


def _machine(run: RunData) -> str:
    last = run.environment[-1] if run.environment else {}
    if not last.get("device"):
        return ""
    ranks = last.get("ranks", 1)
    precision = run.setting("optim.precision")
    text = f"{ranks} ranks, each {last['device']}" if ranks != 1 else f"1 rank, {last['device']}"
    return f"{text}, {precision}" if precision else text


def collapse(run: RunData) -> str:
    """The measures that show a collapse at the end of the run (log.records.COLLAPSE_LIMITS), or ""."""
    found = []
    for key, limit in COLLAPSE_LIMITS.items():
        last = run.scalars[key][1][-max(3, len(run.scalars[key][1]) // 10) :] if key in run.scalars else np.empty(0)
        if len(last) >= 3 and last.mean() < limit:
            measures = f"mean of the last {len(last)} measures"
            found.append(f"{CURVES[key][0]} {last.mean():.3g} (below {limit:g}; {measures})")
    return f"The network gives nearly the same for every image: {'; '.join(found)}." if found else ""


def key_figures(run: RunData) -> list[tuple[str, str, str]]:
    """(name, value, small print): the last value of each curve, with the best one where it differs, and the speed."""
    out = []
    for key in MAIN:
        if key not in run.scalars:
            continue
        y = run.scalars[key][1]
        unit = CURVES[key][1]
        better = f"best {y.max():.1f}" if unit and y.max() - y[-1] >= 0.05 else ""
        value = f"{y[-1]:.1f} {unit}" if unit else f"{y[-max(1, min(len(y) // 20, 50)) :].mean():.4g}"
        out.append((CURVES[key][0], value, better))
    if "total_ms" in run.scalars:
        rate = run_data.binned(run, "images_per_s", 1, "total_ms")[1] if "images_per_s" in run.scalars else np.empty(0)
        out += [("Images/s", f"{rate.mean():,.0f}", "")] if len(rate) else []
    for key, name, factor, unit in (("mfu", "MFU", 100, "%"), ("memory_gib", "Peak memory", 1, "GiB")):
        if key in run.scalars:
            y = run.scalars[key][1]
            value = y.max() if key == "memory_gib" else y[len(y) // 10 :].mean()
            out.append((name, f"{value * factor:.1f} {unit}", ""))
    if run.skipped:
        out.append(("Skipped steps", f"{run.skipped:,}", "fp16 overflow"))
    return out


def baselines(found: list[tuple[str, float]], text: str) -> str:
    """Bars of (name, kNN accuracy in percent), the network first and then its baselines; the best is bold."""
    best = max(value for _, value in found)
    rows = [
        f'<li class="{"base" if i else "own"}{" best" if value == best else ""}"><span>{escape(name)}</span>'
        f'<b>{value:.1f} %</b><span class="bar100"><i style="width:{value:.1f}%"></i></span></li>'
        for i, (name, value) in enumerate(found)
    ]
    return f'{about(text)}<ul class="baselines">{"".join(rows)}</ul>'
