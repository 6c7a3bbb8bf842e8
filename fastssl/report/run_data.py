"""A run folder as the report reads it: log, config, environment and evaluations, as far as they are there.

A run may be training, or have been killed while a line was written: `notes` lists what cannot be read.
"""

from __future__ import annotations

import json
import time
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from fastssl.checkpoint import disk
from fastssl.log.records import PHASES
from fastssl.report.charts import duration

MAX_NUMBER = 1e100  # a larger one is damage, and its square would not be finite
MAX_DEPTH = 30  # of nested values that are shown
MAX_STEP = 2**53  # steps and epochs below it are exact as floats

CURVES = {  # key of the log: title, unit, explanation
    "loss": ("Loss", "", "Losses of different methods or temperatures cannot be compared with each other."),
    "knn_top1": ("kNN, top-1", "%", "Weighted k nearest neighbours on frozen features."),
    "probe_top1": ("Probe, top-1", "%", "The online linear probe, on the test file."),
    "probe_top1_train": ("Probe, top-1 in training", "%", "The online probe on augmented views, before its update."),
    "probe_loss": ("Probe, loss", "", ""),
    "lr": ("Learning rate", "", ""),
    "feature_std": ("Standard deviation of the features", "", "1: equal in all directions. 0: collapsed."),
    "feature_rank": ("Effective rank of the features", "", "RankMe; low or falling hints at dimensional collapse."),
    "embedding_std": ("Standard deviation of the embeddings", "", "1: equal in all directions. 0: collapsed."),
    "embedding_rank": ("Effective rank of the embeddings", "", ""),
}
MAIN = ("loss", "knn_top1", "probe_top1")  # the report says where they are missing
HINTS = {"knn_top1": ": set log.knn_epochs=10", "probe_top1": ": set log.probe=True log.knn_epochs=10"}


@dataclass(eq=False)
class RunData:
    """The contents of a run folder.

    `scalars`: key -> (steps int64 (n,), values float64 (n,)), in order of steps; no value is NaN or infinite."""

    folder: Path
    label: str = ""
    config: dict = field(default_factory=dict)
    scalars: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    steps: int = 0  # the last one logged
    epochs: int = 0  # the last one, from 0
    steps_per_epoch: float | None = None  # None before the second epoch
    skipped: int = 0  # steps without an update, because fp16 overflowed
    environment: list[dict] = field(default_factory=list)
    evaluations: list[tuple[str, dict]] = field(default_factory=list)  # file and result
    notes: list[str] = field(default_factory=list)

    def setting(self, key: str, default: Any = None) -> Any:
        """A setting of the config by its dotted key."""
        value: Any = self.config
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        return default if value is None else value

    def number(self, key: str) -> float | None:
        """A positive number of the config; None for anything else."""
        value = self.setting(key)
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < MAX_NUMBER
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
        age = duration(max(0, time.time() - log.stat().st_mtime))
        return f"at step {self.steps:,}" + (f" of {total:,}" if total else "") + f", last written {age} ago"

    @property
    def on_cpu(self) -> bool:
        """Of the last start.  Entries of older runs do not name the accelerator; a GPU's entry names its memory."""
        last = self.environment[-1] if self.environment else {}
        return last.get("accelerator", "cuda" if "GiB" in str(last.get("device", "GiB")) else "cpu") == "cpu"

    @property
    def x_per_step(self) -> float:
        return 1 / self.steps_per_epoch if self.steps_per_epoch else 1.0


def read(folder: str | Path) -> RunData:
    """ValueError for a folder that is not a run's."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"no run folder {folder}")
    if not any((folder / name).exists() for name in ("log.jsonl", "config.json")):
        raise ValueError(
            f"{folder} is not a run folder: it has neither log.jsonl nor config.json; give the folder that "
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


def is_evaluation(value: Any) -> TypeGuard[dict]:
    rows = value.get("results") if isinstance(value, dict) and isinstance(value.get("protocol"), str) else None
    return isinstance(rows, list) and all(isinstance(row, dict) for row in rows)


def has_checkpoint(run: RunData) -> bool:
    try:
        return disk.newest(run.folder, run.notes.append) is not None
    except disk.NewerFormat as error:
        run.notes.append(str(error))
        return False


def name_runs(runs: list[RunData]) -> None:
    """Labels: the names in the configs, or the folders where these are absent or equal."""
    names = [run.setting("name") for run in runs]
    for run, name in zip(runs, names):
        run.label = str(name) if name and names.count(name) == 1 else str(run.folder)


def _json(path: Path, run: RunData) -> Any:
    if not path.exists():
        return None
    try:
        return sanitize(json.loads(path.read_text()))
    except (ValueError, OSError, RecursionError) as error:
        run.notes.append(f"{path.name} cannot be read ({error})")
        return None


def sanitize(value: Any, depth: int = 0) -> Any:
    """A JSON value that can be shown and computed with: numbers that are not finite or beyond MAX_NUMBER become text,
    characters that UTF-8 cannot encode are replaced, and what is nested deeper than MAX_DEPTH is left out."""
    if isinstance(value, (dict, list)) and depth == MAX_DEPTH:
        return "..."
    if isinstance(value, dict):
        return {sanitize(key): sanitize(part, depth + 1) for key, part in value.items()}
    if isinstance(value, list):
        return [sanitize(part, depth + 1) for part in value]
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not abs(value) < MAX_NUMBER:
        return str(value) if isinstance(value, float) else f"{'-' if value < 0 else ''}over {MAX_NUMBER:g}"
    return value


class Columns:
    """The scalars of a log by key, in flat arrays: the log of an ImageNet run has a million lines."""

    def __init__(self) -> None:
        self.steps: dict[str, array] = {}
        self.values: dict[str, array] = {}
        self.not_finite: dict[str, tuple[int, int]] = {}  # key -> how many, first step

    def add(self, record: dict) -> None:
        step = record["step"]
        for key, value in record.items():
            if key in ("step", "epoch") or value is None or isinstance(value, bool):
                continue
            if isinstance(value, (int, float)) and abs(value) < MAX_NUMBER:
                key = sanitize(key)
                self.steps.setdefault(key, array("q")).append(step)
                self.values.setdefault(key, array("d")).append(value)
            elif isinstance(value, (int, float)) or value in ("nan", "inf", "-inf"):
                count, first = self.not_finite.get(key, (0, step))
                self.not_finite[key] = count + 1, first

    def scalars(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """key -> (steps, values), in order of steps."""
        out = {}
        for key in self.steps:
            x, y = np.array(self.steps[key]), np.array(self.values[key])
            order = np.argsort(x, kind="stable")
            out[key] = x[order], y[order]
        return out


def _read_log(path: Path, run: RunData) -> None:
    if not path.exists():
        run.notes.append("there is no log.jsonl: nothing has been logged yet")
        return
    columns, invalid = Columns(), 0
    first_steps: dict[int, int] = {}  # of each epoch
    with open(path, "rb") as f:
        for line in f:
            record = _record(line)
            if record is None:
                invalid += bool(line.strip()) and line.endswith(b"\n")  # a last line without an end is being written
                continue
            step, epoch = record["step"], record["epoch"]
            run.steps, run.epochs = max(run.steps, step), max(run.epochs, epoch)
            first_steps[epoch] = min(step, first_steps.get(epoch, step))
            run.skipped += record.get("applied") is False
            columns.add(record)
    run.scalars = columns.scalars()
    later = [epoch for epoch in first_steps if epoch > 0]
    if later:  # exact for a run that was not resumed from another run's checkpoint
        run.steps_per_epoch = (first_steps[max(later)] - 1) / max(later)
    if invalid:
        run.notes.append(f"{invalid} lines of log.jsonl are not complete records and were left out")
    for key, (count, first) in columns.not_finite.items():
        run.notes.append(f"{sanitize(key)} was not finite in {count} records, first at step {first}")


def _record(line: bytes) -> dict | None:
    """The record of a line; None where it is not one with its step and epoch."""
    try:
        record = json.loads(line)
        step, epoch = record["step"], record["epoch"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    valid = type(step) is type(epoch) is int and 0 < step < MAX_STEP and 0 <= epoch < MAX_STEP
    return record if valid and isinstance(record, dict) else None


def binned(
    run: RunData, key: str, bins: int = 400, weight: str | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(steps, means, minima, maxima) of at most `bins` intervals of equal numbers of steps; with the key `weight`,
    weighted means."""
    x, y = run.scalars[key]
    w = _values_at(run, weight, x) if weight else np.ones(len(x))
    if len(x) <= bins:
        return x.astype(float), y, y, y
    edges, middle = _intervals(x, bins)
    total = np.add.reduceat(w, edges)
    mean = np.add.reduceat(y * w, edges) / np.where(total > 0, total, 1)
    return middle, mean, np.minimum.reduceat(y, edges), np.maximum.reduceat(y, edges)


def time_per_phase(run: RunData, bins: int = 120) -> tuple[np.ndarray, np.ndarray]:
    """Steps (n,) and the time of each of PHASES in percent of the step (n, 7)."""
    x = run.scalars["total_ms"][0]
    parts = np.stack([_values_at(run, f"{name}_ms", x) for name in PHASES], 1)
    edges, middle = _intervals(x, bins)
    sums = np.add.reduceat(parts, edges, axis=0)
    return middle, 100 * sums / np.maximum(sums.sum(1, keepdims=True), 1e-12)


def _intervals(x: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """First rows and mean steps of at most `bins` intervals of the steps x (n,)."""
    interval = (x - x[0]) * bins // (x[-1] - x[0] + 1) if len(x) > bins else np.arange(len(x))
    edges = np.flatnonzero(np.r_[True, np.diff(interval) > 0])
    return edges, np.add.reduceat(x.astype(float), edges) / np.diff(np.r_[edges, len(x)])


def _values_at(run: RunData, key: str, steps: np.ndarray) -> np.ndarray:
    """The values of `key` at `steps`, 0 where it has none."""
    if key not in run.scalars:
        return np.zeros(len(steps))
    x, y = run.scalars[key]
    at = np.searchsorted(x, steps).clip(max=len(x) - 1)
    return np.where(x[at] == steps, y[at], 0.0)
