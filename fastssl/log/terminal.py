"""What a run prints on rank 0: lines, which log.txt keeps, and a progress bar in a terminal."""

from __future__ import annotations

import atexit
import sys
import time
from pathlib import Path
from typing import Any

from fastssl.log.records import COLLAPSE_LIMITS, TIMING_KEYS

COLLAPSE_COUNT = 3  # measures in a row below their limit after which a collapse is reported, once


class Terminal:
    """Prints the lines of a run, with the speed, the remaining time and a warning of a collapse."""

    def __init__(self, folder: Path, total_steps: int):
        self.folder, self.total_steps = folder, total_steps
        self._progress: Any = None
        self._window: list[dict] = []  # timed records since the last line of a step
        self._started = False  # the line of the first step, which has compilation and the loader's start, is printed
        self._below_limit = 0  # measures of collapse in a row below their limit

    def text(self, text: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "log.txt", "a") as f:
            f.write(text + "\n")
        if self._progress:
            self._progress.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def step(self, record: dict, timed: bool, shown: bool) -> None:
        """Take a record in, and print a line of it if `shown`: of a step with the speed since the last line, or
        (`timed` false) of the end of an epoch."""
        self._warn_collapse(record)
        if timed:
            self._window.append(record)
        if shown:
            speed = self._speed(record["step"]) if timed else []
            self.text("  ".join([*self._scalars(record, timed), *speed]))

    def _scalars(self, record: dict, timed: bool) -> list[str]:
        parts = [f"step {record['step']}/{self.total_steps}", f"epoch {record['epoch']}"]
        hidden = {"step", "epoch"}
        if timed:
            parts += [f"{k} {_short(record[k])}" for k in ("loss", "lr") if k in record]
            hidden |= {"loss", "lr", "applied", *TIMING_KEYS}
            if record.get("loss_scale") == 1.0:
                hidden.add("loss_scale")
        return parts + [f"{k} {_short(v)}" for k, v in record.items() if k not in hidden and v is not None]

    def _speed(self, step: int) -> list[str]:
        """Means over the steps since the last line, weighted by their time; of the first step its time alone."""
        timed = [r for r in self._window if r.get("total_ms")]
        if not timed:
            return []
        self._window = []
        total, memory = sum(r["total_ms"] for r in timed), f"{timed[-1]['memory_gib']:.1f} GiB"
        if not self._started:
            self._started = True
            return [f"first step in {total / 1e3:.1f} s", memory]
        parts = [
            f"{sum(r['images_per_s'] * r['total_ms'] for r in timed) / total:.0f} images/s",
            f"data {100 * sum(r['data_ms'] for r in timed) / total:.0f} %",
        ]
        if timed[-1].get("mfu"):
            parts.append(f"mfu {100 * sum(r['mfu'] * r['total_ms'] for r in timed if r['mfu']) / total:.0f} %")
        seconds = round((self.total_steps - step) * total / len(timed) / 1e3)
        return [*parts, memory, f"eta {_clock(seconds)}"]

    def _warn_collapse(self, record: dict) -> None:
        if not COLLAPSE_LIMITS.keys() & record.keys():
            return
        low = [
            f"{key} {_short(record[key])} (below {limit:g})"
            for key, limit in COLLAPSE_LIMITS.items()
            if key in record and record[key] < limit
        ]
        self._below_limit = self._below_limit + 1 if low else 0
        if self._below_limit == COLLAPSE_COUNT:
            self.text(
                f"step {record['step']}: collapse, the network gives nearly the same for every image: "
                f"{', '.join(low)}; lower optim.lr, or look at the method's settings"
            )

    def advance(self, step: int) -> None:
        """Move the progress bar to `step`, if the output is a terminal."""
        if not sys.stdout.isatty():
            return
        if self._progress is None:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

            columns = ("training", BarColumn(), MofNCompleteColumn(), "eta", TimeRemainingColumn())
            self._progress = Progress(*columns, speed_estimate_period=120)
            self._progress.start()
            atexit.register(self._progress.stop)  # after an error, too: it shows the terminal's cursor again
            self._task = self._progress.add_task("", total=self.total_steps)
        self._progress.update(self._task, completed=step)

    def close(self) -> None:
        if self._progress:
            self._progress.stop()
            self._progress = None


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _clock(seconds: int) -> str:
    return time.strftime("%H:%M:%S", time.gmtime(seconds)) if seconds < 86400 else f"{seconds / 86400:.1f} days"
