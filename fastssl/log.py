"""The run's record: log.jsonl (one line per step), TensorBoard, log.txt, and a progress bar or plain lines on rank 0.

Scalars may be device tensors: they are averaged over ranks and copied to the host together every few steps, and read
when the copy has arrived, so that logging never stalls the device.  Lines are therefore some steps late until `flush`.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastssl import dist, files
from fastssl.files import untrusted

FETCH = 10  # steps between two copies of scalars to the host; a killed run loses the lines of about so many steps


class Row(NamedTuple):
    step: int
    epoch: int
    scalars: dict[str, Any]
    timed: bool  # waits for the meter's record of its step; False: results of an epoch's end


class Later(NamedTuple):
    """A number that the host makes of a tensor, equal on all ranks, once the tensor has arrived there."""

    tensor: Tensor
    function: Callable[[Tensor], float]  # of the tensor on the CPU

    def __float__(self) -> float:
        return float(self.function(self.tensor.cpu()))


class Log:
    """`step` and `epoch` are called on every rank: tensors are averaged over ranks, numbers are rank 0's."""

    def __init__(self, folder: str | Path, *, every: int, total_steps: int, tensorboard: bool = True):
        self.folder, self.every, self.total_steps, self.tensorboard = Path(folder), every, total_steps, tensorboard
        self._main = dist.is_main()
        self._kept = 0  # steps that a resumed run keeps of the log
        self._file = self._writer = self._progress = None
        self._buffer: list[Row] = []  # not yet on their way to the host
        # rows with their values of Later on the way, their scalar tensors, event of the copies
        self._sent: deque[tuple[list[Row], Tensor | None, Any]] = deque()
        self._rows: deque[tuple[Row, dict]] = deque()  # on the host, not yet written
        self._timings: dict[int, dict] = {}
        self._window: list[dict] = []  # records since the last printed line
        self._arrived: list[dict] = []  # records on the host that `step` or `flush` has not yet returned
        self._low = 0  # measures of collapse in a row that are below their limit

    def step(self, step: int, epoch: int, scalars: dict[str, Any], timings: Iterable[dict] = ()) -> list[dict]:
        """Record `step` (from 1).  `timings`: the meter's records, of this or of earlier steps, found by "step".

        Returns the records that have arrived on the host since the last call, some steps late, as means over ranks."""
        self._buffer.append(Row(step, epoch, dict(scalars), True))
        self._time(timings)
        if step % min(FETCH, self.every) == 0 or step in (self._kept + 1, self.total_steps):
            self._send()
        self._drain()
        if self._main and sys.stdout.isatty():
            self._advance(step)
        return self._take_arrived()

    def epoch(self, step: int, epoch: int, scalars: dict[str, Any]) -> None:
        """Record what was measured after `step`, at the end of an epoch, in a line of its own."""
        if scalars:
            self._buffer.append(Row(step, epoch, dict(scalars), False))
            self._send()
            self._drain()

    def text(self, text: str) -> None:
        """Print on rank 0, and keep it in log.txt."""
        if not self._main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "log.txt", "a") as f:
            f.write(text + "\n")
        if self._progress:
            self._progress.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def truncate(self, step: int) -> None:
        """Keep the lines up to `step`, of the run that is resumed there; what came later is done again."""
        self._kept = step
        path = self.folder / "log.jsonl"
        if self._main and path.exists():
            lines = [json.dumps(record) + "\n" for record in read(path) if record["step"] <= step]
            with files.atomic_write(path) as temporary, open(temporary, "w") as f:
                f.writelines(lines)
                f.flush()
                os.fsync(f.fileno())

    def flush(self, timings: Iterable[dict] = ()) -> list[dict]:
        """Write all lines now; waits for the device.  On every rank.  Returns what `step` has not returned."""
        self._time(timings)
        self._send()
        self._drain(wait=True)
        if self._writer:
            self._writer.flush()
        return self._take_arrived()

    def close(self, timings: Iterable[dict] = ()) -> None:
        self.flush(timings)
        for part in (self._file, self._writer):
            if part:
                part.close()
        if self._progress:
            self._progress.stop()
        self._file = self._writer = self._progress = None

    def _take_arrived(self) -> list[dict]:
        arrived, self._arrived = self._arrived, []
        return arrived

    def _time(self, timings: Iterable[dict]) -> None:
        self._timings.update((t["step"], t) for t in timings)

    def _send(self) -> None:
        """Start one copy of all buffered tensors to the host."""
        rows, self._buffer = self._buffer, []
        if not rows:
            return
        tensors = []
        for row in rows:
            for name, value in row.scalars.items():
                if isinstance(value, Tensor):
                    if value.numel() != 1:
                        raise ValueError(f"only scalars are logged: {name!r} has shape {tuple(value.shape)}")
                    tensors.append(value.detach().reshape(()))
        rows = [
            row._replace(
                scalars={
                    k: v._replace(tensor=_fetch(v.tensor)) if isinstance(v, Later) else v
                    for k, v in row.scalars.items()
                }
            )
            for row in rows
        ]
        host = event = None
        if tensors:
            wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
            mean = dist.sum_(torch.stack([t.to(wide) for t in tensors]).double()) / dist.world()
            host = _fetch(mean)
        if dist.device().type == "cuda":
            event = torch.cuda.Event()
            event.record()
        self._sent.append((rows, host, event))

    def _drain(self, wait: bool = False) -> None:
        """Turn what has arrived into lines, in order."""
        while self._sent and (wait or self._sent[0][2] is None or self._sent[0][2].query()):
            rows, host, event = self._sent.popleft()
            if event is not None:
                event.synchronize()
            values = iter(host.tolist() if host is not None else [])
            for row in rows:
                record = {"step": row.step, "epoch": row.epoch}
                record |= {
                    k: _number(next(values), v.dtype)
                    if isinstance(v, Tensor)
                    else float(v)
                    if isinstance(v, Later)
                    else v
                    for k, v in row.scalars.items()
                }
                self._rows.append((row, record))
                self._arrived.append(record)
        done = []
        while self._rows and (wait or not self._rows[0][0].timed or self._rows[0][0].step in self._timings):
            row, record = self._rows.popleft()
            done.append((row, record | (self._timings.pop(row.step, {}) if row.timed else {})))
        if done and self._main:
            self._write(done)

    def _tell_collapse(self, record: dict) -> None:
        """Say it once, at the third measure in a row."""
        if not COLLAPSED.keys() & record.keys():
            return
        low = [
            f"{key} {_short(record[key])} (below {limit:g})"
            for key, limit in COLLAPSED.items()
            if key in record and record[key] < limit
        ]
        self._low = self._low + 1 if low else 0
        if self._low == 3:
            self.text(
                f"step {record['step']}: collapse, the network gives nearly the same for every image: "
                f"{', '.join(low)}; lower optim.lr, or look at the method's settings"
            )

    def _write(self, done: list[tuple[Row, dict]]) -> None:
        if self._file is None:
            self._open()
        lines = [files.to_json(record) for _, record in done]
        self._file.write(("\n".join(lines) + "\n").encode())  # unbuffered, so a kill leaves whole lines
        for row, record in done:
            self._tell_collapse(record)
            if row.timed:
                self._window.append(record)
            shown = row.step % self.every == 0 or row.step == self.total_steps or not row.timed
            if shown and self._writer:
                for name, value in record.items():
                    if isinstance(value, int | float) and name != "step":
                        self._writer.add_scalar(name, value, row.step)
            if shown or row.step == self._kept + 1:  # the first, so that one sees that it runs
                self._print(row, record)

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._kept:  # a new run in a folder without checkpoints
            for old in self.folder.glob("events.out.tfevents.*"):
                old.unlink()
        self._file = open(self.folder / "log.jsonl", "ab" if self._kept else "wb", buffering=0)  # noqa: SIM115
        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # 2 s

            self._writer = SummaryWriter(str(self.folder), purge_step=self._kept + 1 if self._kept else None)

    def _print(self, row: Row, record: dict) -> None:
        parts = [f"step {row.step}/{self.total_steps}", f"epoch {row.epoch}"]
        if not row.timed:
            hidden = {"step", "epoch"}
        else:
            parts += [f"{k} {_short(record[k])}" for k in ("loss", "lr") if k in record]
            hidden = {"step", "epoch", "loss", "lr", "applied", *TIMING_KEYS}
            if record.get("loss_scale") == 1.0:
                hidden.add("loss_scale")
        parts += [f"{k} {_short(v)}" for k, v in record.items() if k not in hidden and v is not None]
        timed = [r for r in self._window if r.get("total_ms")]
        if row.timed and timed:
            total = sum(r["total_ms"] for r in timed)
            parts += [
                f"{sum(r['images_per_s'] * r['total_ms'] for r in timed) / total:.0f} images/s",
                f"data {100 * sum(r['data_ms'] for r in timed) / total:.0f} %",
            ]
            if timed[-1].get("mfu"):
                parts.append(f"mfu {100 * sum(r['mfu'] * r['total_ms'] for r in timed if r['mfu']) / total:.0f} %")
            seconds = round((self.total_steps - row.step) * total / len(timed) / 1e3)
            parts += [f"{timed[-1]['memory_gib']:.1f} GiB", f"eta {_clock(seconds)}"]
            self._window = []
        self.text("  ".join(parts))

    def _advance(self, step: int) -> None:
        if self._progress is None:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._progress = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                speed_estimate_period=120,
            )
            self._progress.start()
            atexit.register(self._progress.stop)  # an error must not leave the terminal without a cursor
            self._task = self._progress.add_task("", total=self.total_steps)
        self._progress.update(self._task, completed=step)


# Below these a run has collapsed (hooks.Collapse).  Digits, a ResNet-10, 100 steps: SimCLR has embedding_std 1.0,
# embedding_rank 21 and feature_rank 58; VICReg without its variance and covariance terms 0.07, 1.7 and 30.
COLLAPSED = {"feature_std": 0.02, "feature_rank": 2.0, "embedding_std": 0.1, "embedding_rank": 2.0}
TIMING_KEYS = (
    "data_ms",
    "views_ms",
    "forward_ms",
    "backward_ms",
    "optimizer_ms",
    "step_ms",
    "other_ms",
    "total_ms",
    "images_per_s",
    "memory_gib",
    "mfu",
)


def read(path: str | Path) -> list[dict]:
    """The records of a log.jsonl (or of the run folder that holds it); a last line cut short is left out.  ValueError
    for a line that is not a record with its step."""
    path = Path(path) / "log.jsonl" if Path(path).is_dir() else Path(path)
    out = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        if not line.strip():
            continue
        record = untrusted.parse_json(line, f"{path}, line {number},")
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            raise ValueError(f"{path}, line {number}, is not the record of a step: remove the line")
        out.append(record)
    return out


def _fetch(x: Tensor) -> Tensor:
    """Start a copy to the host, which does not wait for it."""
    if not x.is_cuda:
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def _number(value: float, dtype: torch.dtype) -> float | bool:
    return bool(value) if dtype == torch.bool else value


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _clock(seconds: int) -> str:
    return time.strftime("%H:%M:%S", time.gmtime(seconds)) if seconds < 86400 else f"{seconds / 86400:.1f} days"
