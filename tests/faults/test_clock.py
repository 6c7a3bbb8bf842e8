"""The clock of the machine jumps while a run trains."""

import itertools
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "methods"))
import method_cases as cases

from fastssl import dist, engine


def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch):
    """By a day forward and back, at every look: the same losses, times from 0, and no time-out."""
    losses, now, days = {}, time.time, itertools.cycle((86400, -86400, 0))
    for name in ("steady", "jumping"):
        if name == "jumping":
            monkeypatch.setattr(time, "time", lambda: now() + next(days))
        run = cases.run("moco", steps=5, norm=False)
        run.name, run.log.root, run.timeout_s, run.log.every = name, str(tmp_path), 600.0, 1
        dist.init("cpu")
        t = engine.fit(run, device="cpu", loader=cases.loader(run))
        records = [json.loads(line) for line in (t.folder / "log.jsonl").read_text().splitlines()]
        losses[name] = [r["loss"] for r in records]
        assert all(r[key] >= 0 for r in records for key in r if key.endswith("_ms"))
        assert all(0 < r["total_ms"] < 600e3 for r in records)
    assert losses["steady"] == losses["jumping"] and len(losses["steady"]) == 5
    dist.shutdown()
