"""The record of a run: log.jsonl (one line per step), TensorBoard, log.txt, and the terminal on rank 0.

Scalars may be device tensors: they are averaged over ranks and copied to the host together every few steps, and read
when the copy has arrived, so that logging never stalls the device.  Lines are therefore some steps late until `flush`.
"""

from __future__ import annotations

import io
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastssl import dist, files
from fastssl.log.records import read
from fastssl.log.terminal import Terminal

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

COPY_INTERVAL = 10  # steps between two copies of scalars to the host; a killed run loses the lines of as many steps


class Row(NamedTuple):
    step: int
    epoch: int
    scalars: dict[str, Any]
    timed: bool  # waits for the meter's record of its step; False: results of an epoch's end


class Copy(NamedTuple):
    """Rows whose tensors are on their way to the host."""

    rows: list[Row]
    host: Tensor | None  # their scalar tensors, in order
    event: Any  # of the copy; None on the CPU

    def arrived(self) -> bool:
        return self.event is None or self.event.query()


class HostScalar(NamedTuple):
    """A number that the host computes from a tensor, equal on all ranks, once the tensor has arrived there."""

    tensor: Tensor
    function: Callable[[Tensor], float]  # of the tensor on the CPU

    def __float__(self) -> float:
        return float(self.function(self.tensor.cpu()))


class Log:
    """`step` and `epoch` are called on every rank: tensors are averaged over ranks, numbers are rank 0's."""

    def __init__(self, folder: str | Path, *, every: int, total_steps: int, tensorboard: bool = True):
        self.folder, self.every, self.total_steps, self.tensorboard = Path(folder), every, total_steps, tensorboard
        self._terminal = Terminal(self.folder, total_steps) if dist.is_main() else None
        self._resumed = 0  # the step that a resumed run continues from
        self._file: io.FileIO | None = None
        self._writer: SummaryWriter | None = None
        self._buffer: list[Row] = []  # tensors on the device
        self._copies: deque[Copy] = deque()  # on their way to the host
        self._rows: deque[tuple[Row, dict]] = deque()  # on the host, not yet written
        self._timings: dict[int, dict] = {}
        self._arrived: list[dict] = []  # records on the host that `step` or `flush` has not yet returned

    def step(self, step: int, epoch: int, scalars: dict[str, Any], timings: Iterable[dict] = ()) -> list[dict]:
        """Record `step` (from 1).  `timings`: the meter's records, of this or of earlier steps, found by "step".

        Returns the records that have arrived on the host since the last call, some steps late, as means over ranks."""
        self._buffer.append(Row(step, epoch, dict(scalars), True))
        self._add_timings(timings)
        if step % min(COPY_INTERVAL, self.every) == 0 or step in (self._resumed + 1, self.total_steps):
            self._copy()
        self._write_arrived()
        if self._terminal:
            self._terminal.advance(step)
        return self._take_arrived()

    def epoch(self, step: int, epoch: int, scalars: dict[str, Any]) -> None:
        """Record what was measured after `step`, at the end of an epoch, in a separate line."""
        if scalars:
            self._buffer.append(Row(step, epoch, dict(scalars), False))
            self._copy()
            self._write_arrived()

    def text(self, text: str) -> None:
        """Print on rank 0, also into log.txt."""
        if self._terminal:
            self._terminal.text(text)

    def truncate(self, step: int) -> None:
        """Keep the lines up to `step`, from which the run is resumed; later ones will be written again."""
        self._resumed = step
        path = self.folder / "log.jsonl"
        if self._terminal and path.exists():
            lines = [json.dumps(record) + "\n" for record in read(path) if record["step"] <= step]
            with files.atomic_write(path) as temporary, open(temporary, "w") as f:
                f.writelines(lines)
                f.flush()
                os.fsync(f.fileno())

    def flush(self, timings: Iterable[dict] = ()) -> list[dict]:
        """Write all lines now; waits for the device.  On every rank.  Returns what `step` has not returned."""
        self._add_timings(timings)
        self._copy()
        self._write_arrived(wait=True)
        if self._writer:
            self._writer.flush()
        return self._take_arrived()

    def close(self, timings: Iterable[dict] = ()) -> None:
        self.flush(timings)
        self.close_files()

    def close_files(self) -> None:
        """Close without writing what waits: after an error, when the other ranks may not come to `flush`."""
        for part in (self._file, self._writer, self._terminal):
            if part:
                part.close()
        self._file = self._writer = None

    def _take_arrived(self) -> list[dict]:
        arrived, self._arrived = self._arrived, []
        return arrived

    def _add_timings(self, timings: Iterable[dict]) -> None:
        self._timings.update((t["step"], t) for t in timings)

    def _copy(self) -> None:
        """Start one copy of all buffered tensors to the host."""
        rows, self._buffer = self._buffer, []
        if not rows:
            return
        tensors = [_scalar(k, v) for row in rows for k, v in row.scalars.items() if isinstance(v, Tensor)]
        rows = [row._replace(scalars={k: _copy_host_scalar(v) for k, v in row.scalars.items()}) for row in rows]
        host = event = None
        if tensors:
            wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
            mean = dist.sum_(torch.stack([t.to(wide) for t in tensors]).double()) / dist.world()
            host = _copy_to_host(mean)
        if dist.device().type == "cuda":
            event = torch.cuda.Event()
            event.record()
        self._copies.append(Copy(rows, host, event))

    def _write_arrived(self, wait: bool = False) -> None:
        """Write what has arrived, in order."""
        while self._copies and (wait or self._copies[0].arrived()):
            rows, host, event = self._copies.popleft()
            if event is not None:
                event.synchronize()
            values = iter(host.tolist() if host is not None else [])
            for row in rows:
                record = {"step": row.step, "epoch": row.epoch}
                record |= {k: _number(v, values) for k, v in row.scalars.items()}
                self._rows.append((row, record))
                self._arrived.append(record)
        done = []
        while self._rows and (wait or not self._rows[0][0].timed or self._rows[0][0].step in self._timings):
            row, record = self._rows.popleft()
            done.append((row, record | (self._timings.pop(row.step, {}) if row.timed else {})))
        if done and self._terminal:
            self._write(done, self._terminal)

    def _write(self, done: list[tuple[Row, dict]], terminal: Terminal) -> None:
        if self._file is None:
            self._file = self._open()
        lines = [files.to_json(record) for _, record in done]
        self._file.write(("\n".join(lines) + "\n").encode())  # unbuffered, so a kill leaves whole lines
        for row, record in done:
            shown = row.step % self.every == 0 or row.step == self.total_steps or not row.timed
            if shown and self._writer:
                for name, value in record.items():
                    if isinstance(value, int | float) and name != "step":
                        self._writer.add_scalar(name, value, row.step)
            terminal.step(record, row.timed, shown or row.step == self._resumed + 1)  # the first: it runs

    def _open(self) -> io.FileIO:
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._resumed:  # a new run in a folder without checkpoints
            for old in self.folder.glob("events.out.tfevents.*"):
                old.unlink()
        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # 2 s

            self._writer = SummaryWriter(str(self.folder), purge_step=self._resumed + 1 if self._resumed else None)
        return open(self.folder / "log.jsonl", "ab" if self._resumed else "wb", buffering=0)


def _scalar(name: str, value: Tensor) -> Tensor:
    if value.numel() != 1:
        raise ValueError(f"only scalars are logged: {name!r} has shape {tuple(value.shape)}")
    return value.detach().reshape(())


def _copy_host_scalar(value: Any) -> Any:
    return value._replace(tensor=_copy_to_host(value.tensor)) if isinstance(value, HostScalar) else value


def _copy_to_host(x: Tensor) -> Tensor:
    """Start a copy, without waiting for it."""
    if not x.is_cuda:
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def _number(value: Any, values: Iterator[float]) -> Any:
    """What is logged for `value`; a tensor's number is the next one of `values`."""
    if isinstance(value, Tensor):
        number = next(values)
        return bool(number) if value.dtype == torch.bool else number
    return float(value) if isinstance(value, HostScalar) else value
