"""Results of finished trainings of an evaluation that has many, so that one that is stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastssl import dist
from fastssl.eval.common.cache import on_main

ELSEWHERE = "give another --out"


class StoredResults:
    """RESULT.part.jsonl beside the result that is to be written: what the results depend on, then one line for each.

    A file of other settings or weights is begun anew.  Only the first rank touches it; all ranks get its results.
    """

    def __init__(self, out: str | None, facts: dict):
        self.path = Path(out).with_suffix(".part.jsonl") if out else None
        self.key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        found: list[dict] = []
        if self.path:
            on_main(lambda: found.append(self._begin()), ELSEWHERE)
        self.done = shared(found[0] if found else None) or {}

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        """What `work()` returns (JSON can hold it), or returned in the call before."""
        if name not in self.done:
            self.done[name] = work()
            if self.path:
                on_main(lambda: self._append({"name": name, "result": self.done[name]}), ELSEWHERE)
        return self.done[name]

    def remove(self) -> None:
        """Once the whole is written nobody needs the parts."""
        if self.path:
            on_main(lambda: self.path.unlink(missing_ok=True), ELSEWHERE)

    def _begin(self) -> dict:
        lines = []
        if self.path.exists():
            for line in self.path.read_text(errors="replace").splitlines():
                try:
                    lines.append(json.loads(line))
                except ValueError:  # the line that was being written
                    break
        if lines and lines[0] != {"key": self.key}:
            print(f"{self.path} is of other settings, data or weights: starting over", flush=True)
            lines = []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(json.dumps(line) + "\n" for line in [{"key": self.key}, *lines[1:]]))
        return {line["name"]: line["result"] for line in lines[1:]}

    def _append(self, line: dict) -> None:
        with open(self.path, "a") as f:
            f.write(json.dumps(line) + "\n")
            f.flush()
            os.fsync(f.fileno())


def shared(value: Any) -> Any:
    """The first rank's value (JSON can hold it), on all ranks."""
    text = json.dumps(value).encode()
    size = int(dist.broadcast_(torch.tensor([len(text)], device=dist.device())))
    out = torch.zeros(size, dtype=torch.uint8, device=dist.device())
    if dist.is_main():
        out.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    return json.loads(bytes(dist.broadcast_(out).tolist()))
