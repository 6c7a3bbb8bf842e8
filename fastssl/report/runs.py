"""A run folder as the report reads it: log, config, environment and evaluations, whatever of them is there.

A run may be in training, or killed while a line was being written: what cannot be read is left out and said in `notes`.
"""

from __future__ import annotations

import json
import time
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastssl.checkpoint import store
from fastssl.log.records import COLLAPSE_LIMITS, TIMING_KEYS

LARGEST = 1e100  # a number above it is damage, and its square would not be finite
DEEPEST = 30  # of nested values that are shown
LAST = 2**53  # steps and epochs below it are exact as floats
PHASES = ("data", "views", "forward", "backward", "optimizer", "other", "step")  # step: a whole one, as a CUDA graph

CURVES = {  # key of the log: title, unit, what it says
    "loss": ("Loss", "", "Losses of different methods or temperatures cannot be compared with each other."),
    "knn_top1": ("kNN, top-1", "%", "Weighted k nearest neighbours on frozen features."),
    "probe_top1": ("Probe, top-1", "%", "The online linear probe, on the test file."),
    "probe_top1_train": ("Probe, top-1 in training", "%", "The online probe on augmented views, before its update."),
    "probe_loss": ("Probe, loss", "", ""),
    "lr": ("Learning rate", "", ""),
    "feature_std": ("Spread of the features", "", "1: evenly in all directions. 0: collapsed."),
    "feature_rank": ("Effective rank of the features", "", "RankMe; low or falling hints at dimensional collapse."),
    "embedding_std": ("Spread of the embeddings", "", "1: evenly in all directions. 0: collapsed."),
    "embedding_rank": ("Effective rank of the embeddings", "", ""),
}
MAIN = ("loss", "knn_top1", "probe_top1")  # said to be missing where no run has them
HINTS = {"knn_top1": "log.knn_epochs=10 log it", "probe_top1": "log.probe=True log.knn_epochs=10 log it"}


@dataclass(eq=False)
class RunData:
    """`scalars`: key -> (steps int64 (n,), values float64 (n,)), in order of steps; no value is NaN or infinite."""

    folder: Path
    label: str = ""
    config: dict = field(default_factory=dict)
    scalars: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    steps: int = 0  # the last one logged
    epochs: int = 0  # the last one begun, from 0
    steps_per_epoch: float | None = None  # None before the second epoch
    skipped: int = 0  # steps whose update fp16 left out
    environment: list[dict] = field(default_factory=list)
    evaluations: list[tuple[str, dict]] = field(default_factory=list)  # file and result
    notes: list[str] = field(default_factory=list)

    def setting(self, key: str, otherwise: Any = None) -> Any:
        value = self.config
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        return otherwise if value is None else value

    def number(self, key: str) -> float | None:
        """A positive number of the config; None for anything else."""
        value = self.setting(key)
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < LARGEST
        return value if good else None

    @property
    def total_steps(self) -> int | None:
        epochs = self.number("optim.epochs")
        if steps := self.number("optim.steps"):
            return int(steps)
        return round(epochs * self.steps_per_epoch) if self.steps_per_epoch and epochs else None

    @property
    def status(self) -> str:
        if not self.steps:
            return "no step logged yet"
        total = self.total_steps
        if total and self.steps >= total:
            return f"finished: {total:,} steps"
        log = self.folder / "log.jsonl"
        ago = max(0, time.time() - log.stat().st_mtime)
        since = f"{ago:.0f} s" if ago < 120 else f"{ago / 60:.0f} min" if ago < 7200 else f"{ago / 3600:.0f} h"
        return f"at step {self.steps:,}" + (f" of {total:,}" if total else "") + f", last written {since} ago"

    @property
    def on_cpu(self) -> bool:
        """Where it was started last; a GPU's entry names its memory (older runs do not say which it is)."""
        last = self.environment[-1] if self.environment else {}
        return last.get("accelerator", "cuda" if "GiB" in str(last.get("device", "GiB")) else "cpu") == "cpu"

    @property
    def x_per_step(self) -> float:
        return 1 / self.steps_per_epoch if self.steps_per_epoch else 1.0


def read(folder: str | Path) -> RunData:
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"no run folder {folder}")
    if not any((folder / name).exists() for name in ("log.jsonl", "config.json")):
        raise ValueError(
            f"{folder} is no run folder: it has neither log.jsonl nor config.json; give the folder that "
            "`fastssl train` wrote, below work_dirs/"
        )
    run = RunData(folder)
    config = _json(folder / "config.json", run)
    run.config = config if isinstance(config, dict) else {}
    environment = _json(folder / "environment.json", run)
    run.environment = [e for e in environment if isinstance(e, dict)] if isinstance(environment, list) else []
    _read_log(folder / "log.jsonl", run)
    for file in sorted([*folder.glob("*.json"), *folder.glob("eval/**/*.json")]):
        result = _json(file, run) if file.name not in ("config.json", "environment.json") else None
        if is_evaluation(result):
            run.evaluations.append((str(file), result))
    return run


def card(path: str) -> dict:
    """ "samples" and "classes" of a data card, where it is here and holds them."""
    try:
        found = json.loads(Path(path).with_suffix(".json").read_text())
    except (OSError, ValueError):
        return {}
    found = found if isinstance(found, dict) else {}
    return {key: found[key] for key, kind in (("samples", int), ("classes", list)) if isinstance(found.get(key), kind)}


def collapsed(run: RunData) -> list[tuple[str, float, float, int]]:
    """(key, mean, limit, count) of the measures of collapse that are below their limit in the last tenth, three at
    least."""
    out = []
    for key, limit in COLLAPSE_LIMITS.items():
        y = run.scalars[key][1] if key in run.scalars else ()
        count = max(3, len(y) // 10)
        if len(y) >= 3 and (value := float(y[-count:].mean())) < limit:
            out.append((key, value, limit, min(count, len(y))))
    return out


def is_evaluation(value: Any) -> bool:
    rows = value.get("results") if isinstance(value, dict) and isinstance(value.get("protocol"), str) else None
    return isinstance(rows, list) and all(isinstance(row, dict) for row in rows)


def has_checkpoint(run: RunData) -> bool:
    path, damaged = store.find_newest(run.folder)
    run.notes += damaged
    return path is not None


def name_runs(runs: list[RunData]) -> None:
    """Labels: the names in the configs, or the folders where these are absent or equal."""
    names = [run.setting("name") for run in runs]
    for run, name in zip(runs, names):
        run.label = str(name) if name and names.count(name) == 1 else str(run.folder)


def _json(path: Path, run: RunData) -> Any:
    if not path.exists():
        return None
    try:
        return sane(json.loads(path.read_text()))
    except (ValueError, OSError, RecursionError) as error:
        run.notes.append(f"{path.name} cannot be read ({error})")
        return None


def sane(value: Any, depth: int = 0) -> Any:
    """What a file of JSON holds, so that it can be shown and computed with: numbers beyond LARGEST and those that are
    not finite become text, text that UTF-8 cannot hold loses that part, and what is nested deeper is left out."""
    if isinstance(value, (dict, list)) and depth == DEEPEST:
        return "..."
    if isinstance(value, dict):
        return {sane(key): sane(part, depth + 1) for key, part in value.items()}
    if isinstance(value, list):
        return [sane(part, depth + 1) for part in value]
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not abs(value) < LARGEST:
        return str(value) if isinstance(value, float) else f"{'-' if value < 0 else ''}over {LARGEST:g}"
    return value


def _read_log(path: Path, run: RunData) -> None:
    """A log of an ImageNet run has a million lines: numbers go into flat arrays, line by line."""
    if not path.exists():
        run.notes.append("there is no log.jsonl: nothing has been logged yet")
        return
    steps: dict[str, array] = {}
    values: dict[str, array] = {}
    bad, starts = 0, {}
    lost: dict[str, tuple[int, int]] = {}  # key -> how many, first step
    with open(path, "rb") as f:
        for line in f:
            try:
                record = json.loads(line)
                step, epoch = record["step"], record["epoch"]
                if not (type(step) is type(epoch) is int and 0 < step < LAST and 0 <= epoch < LAST):
                    raise ValueError("no step and epoch")
            except (ValueError, KeyError, TypeError, RecursionError):
                bad += bool(line.strip()) and line.endswith(b"\n")  # a last line without its end is being written
                continue
            run.steps, run.epochs = max(run.steps, step), max(run.epochs, epoch)
            starts[epoch] = min(step, starts.get(epoch, step))
            run.skipped += record.get("applied") is False
            for key, value in record.items():
                if key in ("step", "epoch") or value is None or isinstance(value, bool):
                    continue
                if not isinstance(value, (int, float)) or not abs(value) < LARGEST:
                    if isinstance(value, (int, float)) or value in ("nan", "inf", "-inf"):
                        count, first = lost.get(key, (0, step))
                        lost[key] = count + 1, first
                    continue
                key = sane(key)
                steps.setdefault(key, array("q")).append(step)
                values.setdefault(key, array("d")).append(value)
    for key in steps:
        x, y = np.array(steps[key]), np.array(values[key])
        order = np.argsort(x, kind="stable")
        run.scalars[key] = x[order], y[order]
    later = [e for e in starts if e > 0]
    if later:  # the second epoch's first line is of its first step; with steps of another run's resume, still nearly
        run.steps_per_epoch = (starts[max(later)] - 1) / max(later)
    if bad:
        run.notes.append(f"{bad} lines of log.jsonl are no complete records and were left out")
    for key, (count, first) in lost.items():
        run.notes.append(f"{sane(key)} was not finite in {count} records, first at step {first}")


def binned(run: RunData, key: str, bins: int = 400, weight: str | None = None):
    """(steps, means, least, most) of at most `bins` equal stretches of the run; with `weight`, weighted means."""
    x, y = run.scalars[key]
    w = _aligned(run, weight, x) if weight else np.ones(len(x))
    if len(x) <= bins:
        return x.astype(float), y, y, y
    place = ((x - x[0]) * bins // (x[-1] - x[0] + 1)).astype(int)
    edges = np.flatnonzero(np.r_[True, np.diff(place) > 0])
    total = np.add.reduceat(w, edges)
    mean = np.add.reduceat(y * w, edges) / np.where(total > 0, total, 1)
    middle = np.add.reduceat(x.astype(float), edges) / np.diff(np.r_[edges, len(x)])
    return middle, mean, np.minimum.reduceat(y, edges), np.maximum.reduceat(y, edges)


def split(run: RunData, bins: int = 120) -> tuple[np.ndarray, np.ndarray]:
    """Steps (n,) and the share of each of PHASES in the time of a step (n, 7), in percent."""
    x = run.scalars["total_ms"][0]
    parts = np.stack([_aligned(run, f"{name}_ms", x) for name in PHASES], 1)
    place = ((x - x[0]) * bins // (x[-1] - x[0] + 1)).astype(int) if len(x) > bins else np.arange(len(x))
    edges = np.flatnonzero(np.r_[True, np.diff(place) > 0])
    middle = np.add.reduceat(x.astype(float), edges) / np.diff(np.r_[edges, len(x)])
    sums = np.add.reduceat(parts, edges, axis=0)
    return middle, 100 * sums / np.maximum(sums.sum(1, keepdims=True), 1e-12)


def _aligned(run: RunData, key: str, steps: np.ndarray) -> np.ndarray:
    """The values of `key` at `steps`, 0 where it has none."""
    if key not in run.scalars:
        return np.zeros(len(steps))
    x, y = run.scalars[key]
    at = np.searchsorted(x, steps).clip(max=len(x) - 1)
    return np.where(x[at] == steps, y[at], 0.0)


def curves(run: RunData) -> list[str]:
    """Keys that are drawn under Training: all but those of the meter."""
    return [key for key in run.scalars if key not in TIMING_KEYS]
