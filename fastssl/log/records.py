"""log.jsonl: the keys that the meter writes, the limits of a collapse, and reading it."""

from __future__ import annotations

import warnings
from pathlib import Path

from fastssl.files import untrusted

# Below these a run has collapsed (hooks.Collapse).  Digits, a ResNet-10, 100 steps: SimCLR has embedding_std 1.0,
# embedding_rank 21 and feature_rank 58; VICReg without its variance and covariance terms 0.07, 1.7 and 30.
COLLAPSE_LIMITS = {"feature_std": 0.02, "feature_rank": 2.0, "embedding_std": 0.1, "embedding_rank": 2.0}
PHASES = ("data", "views", "forward", "backward", "optimizer", "other", "step")  # meters.PHASES and the rest
TIMING_KEYS = (*(f"{name}_ms" for name in (*PHASES, "total")), "images_per_s", "memory_gib", "mfu")
RESERVED = ("step", "epoch", "lr", "loss_scale", "applied", *TIMING_KEYS)  # what a method or a hook must not log


def read(path: str | Path) -> list[dict]:
    """The records of a log.jsonl, or of the run folder that holds it, without an incomplete last line.

    Other lines that are not the record of a step are left out, with a warning: a process that is killed while it writes
    leaves one behind."""
    path = Path(path) / "log.jsonl" if Path(path).is_dir() else Path(path)
    out, damaged = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        if not line.strip():
            continue
        try:
            record = untrusted.parse_json(line, path)
        except ValueError:
            record = None
        if isinstance(record, dict) and type(record.get("step")) is int:
            out.append(record)
        else:
            damaged.append(number)
    if damaged:
        first = ", ".join(map(str, damaged[:3])) + ", ..." * (len(damaged) > 3)
        warnings.warn(
            f"{path}: {len(damaged)} lines that are not the record of a step are left out: {first}", stacklevel=2
        )
    return out
