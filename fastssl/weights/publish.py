"""`fastssl publish`: all weights of a run or a checkpoint, without the optimizer, in a file named by its hash."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from fastssl import files, options, weights
from fastssl.parsing import run_command
from fastssl.weights.source import read_model


def publish(source: str | Path, folder: str | Path | None = None, name: str | None = None) -> tuple[Path, str]:
    """Write NAME-<8 hex digits>.safetensors and return it with its SHA-256, whose first digits are in its name.

    The same weights give the same bytes.  ValueError where there are none, or where one is not finite."""
    file, state = read_model(source)
    if not state:
        raise ValueError(f"{file} holds no weights to publish")
    bad = [key for key, value in state.items() if not value.isfinite().all()]
    if bad:
        raise ValueError(f"{file}: {bad[0]} holds NaN or infinity; that training diverged")
    run, spec = weights.run_config(source), weights.spec_of(source)
    metadata = weights.metadata(spec) if spec else {"format": "pt"}
    if run:
        data = run["data"]
        names = {key: Path(data[key]).name for key in ("train", "test", "bank") if data.get(key)}
        metadata["fastssl.config"] = json.dumps(_without_folders({**run, "data": {**data, **names}}))
    name = name or (run["name"].replace("/", "_") if run else re.sub(r"-[0-9a-f]{8}$", "", Path(source).stem))
    folder = Path(folder or (source if Path(source).is_dir() else Path(source).parent))
    temporary = folder / f"{name}.publishing"  # the hash, and so the name, follows from the written bytes
    try:
        # copies: a network that was registered twice shares memory, which the format does not allow
        files.write_safetensors(temporary, {k: v.clone().contiguous() for k, v in state.items()}, metadata)
        digest = files.sha256(temporary)
        path = folder / f"{name}-{digest[:8]}.safetensors"
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path, digest


def _without_folders(value: Any) -> Any:
    """JSON data in which an absolute path is only its last part: folders are private."""
    if isinstance(value, dict):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def main(argv: list[str] | None = None) -> int:
    args = options.parse("publish", argv)

    def work() -> None:
        path, digest = publish(args.source, args.out, args.name)
        print(f"wrote {path}\nSHA-256 {digest}")

    return run_command("publish", work)
