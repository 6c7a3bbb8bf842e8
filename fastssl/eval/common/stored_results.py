"""The results of the trainings of an evaluation, on disk: after a stop it continues with the missing ones."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fastssl import files
from fastssl.eval.common.ranks import on_main
from fastssl.files import untrusted

REMEDY = "give another --out"


class StoredResults:
    """RESULT.part.jsonl beside the result that will be written: a hash of what the results depend on, then one line for
    each.

    A file of other settings or weights is begun again.  Only rank 0 reads and writes it; all ranks get its results.
    """

    def __init__(self, out: str | None, facts: dict) -> None:
        self.path = Path(out).with_suffix(".part.jsonl") if out else None
        self.key = files.sha256_json(facts)
        self.done: dict[str, Any] = on_main(partial(self._begin, self.path), REMEDY) if self.path else {}

    def get(self, name: str, compute: Callable[[], Any]) -> Any:
        """The stored result of that name, or else what `compute()` returns, which JSON must be able to hold."""
        if name not in self.done:
            self.done[name] = compute()
            if self.path:
                line = json.dumps({"name": name, "result": self.done[name]}) + "\n"
                on_main(partial(self._append, self.path, line), REMEDY)
        return self.done[name]

    def remove(self) -> None:
        """Delete the file, when all results are in one."""
        if self.path:
            on_main(partial(self.path.unlink, missing_ok=True), REMEDY)

    def _begin(self, path: Path) -> dict[str, Any]:
        lines = []
        if path.exists():
            for line in path.read_text(errors="replace").splitlines():
                try:
                    lines.append(untrusted.parse_json(line, path))
                except ValueError:  # the line that was being written
                    break
        if lines and lines[0] != {"key": self.key}:
            print(f"{path} is of other settings, data or weights: starting over", flush=True)
            lines = []
        path.parent.mkdir(parents=True, exist_ok=True)
        valid = [line for line in lines[1:] if isinstance(line, dict) and isinstance(line.get("name"), str)]
        results = [line for line in valid if "result" in line]
        path.write_text("".join(json.dumps(line) + "\n" for line in [{"key": self.key}, *results]))
        return {line["name"]: line["result"] for line in results}

    def _append(self, path: Path, line: str) -> None:
        with open(path, "a") as f:
            f.write(line)
            f.flush()
            os.fsync(f.fileno())
