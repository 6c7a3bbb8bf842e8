"""Saving and resuming a run: parameters and optimizer by DeepSpeed, everything else beside them.

A checkpoint folder holds `deepspeed/` (all ZeRO stages), `weights.safetensors` (the whole method, for evaluation and
export whatever the stage), `state.pt` (step, loss scale, hooks, config) and `rank_R.pt` (random states).
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections import deque
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import deepspeed
import safetensors
import safetensors.torch
import torch
import torch.distributed as td
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor, nn

from fastssl import checkpoint, dist, untrusted
from fastssl.config import Run, dump, dumps

RESULTS = ("method", "backbone", "data", "optim", "seed", "sync_bn")  # sections that a resumed run must share


@torch.no_grad()
def whole(module: nn.Module, everywhere: bool = False) -> dict[str, Tensor]:
    """A copy of the state dict with ZeRO-3's shards gathered, a submodule at a time: on rank 0 (elsewhere empty), or
    on every rank."""
    mine, out = everywhere or dist.is_main(), {}
    for name, child in module.named_modules():
        with deepspeed.zero.GatheredParameters(list(child.parameters(recurse=False))):
            if mine:
                own: dict[str, Tensor] = {}
                child._save_to_state_dict(own, name + "." if name else "", False)
                out.update({key: value.detach().clone(memory_format=torch.contiguous_format)
                            for key, value in own.items()})
    for name in getattr(module, "sharded", ()):
        blocks = _blocks(getattr(module, name))
        if mine:
            out[name] = torch.cat([block.cpu() for block in blocks])
        else:
            deque(blocks, maxlen=0)
    return out


def _blocks(mine: Tensor) -> Iterator[Tensor]:
    """The blocks of a table that is cut by dist.share, one at a time, since the whole may not fit on a device."""
    sizes = dist.gather(torch.tensor([len(mine)], device=mine.device)).tolist()
    for source, size in enumerate(sizes):
        block = mine.clone() if source == dist.rank() else mine.new_empty(size, *mine.shape[1:])
        yield dist.broadcast_(block, source)


def random_states(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def set_random_states(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def save(t) -> Path | None:
    """Write a complete checkpoint of a trainer; returns its folder on rank 0."""
    dist.sync_buffers(t.method)
    paths = [str(checkpoint.begin(t.folder, t.step)) if dist.is_main() else None]
    if dist.world() > 1:
        td.broadcast_object_list(paths)
    path = Path(paths[0])
    t.ds.save_checkpoint(str(path), tag="deepspeed", save_latest=False)
    torch.save(random_states(t.device), path / f"rank_{dist.rank()}.pt")
    weights = whole(t.method)
    if dist.is_main():
        safetensors.torch.save_file({k: v.cpu() for k, v in weights.items()}, path / "weights.safetensors")
        torch.save({"step": t.step, "scale": t.scale.state_dict(), "config": dump(t.run), "world": dist.world(),
                    "hooks": [h.state_dict() if hasattr(h, "state_dict") else {} for h in t.hooks]}, path / "state.pt")
    dist.barrier()
    done = checkpoint.commit(path, t.run.log.keep) if dist.is_main() else None
    dist.barrier()
    return done


def find(run: Run, resume: bool, say=print) -> Path | None:
    """The checkpoint to continue from, or None to begin; every reason why `run` cannot is an error here, before
    anything is built."""
    folder = run_folder(run)
    found = [checkpoint.newest(folder, say)] if dist.is_main() else [None]
    if dist.world() > 1:
        td.broadcast_object_list(found)
    path = found[0]
    if not resume:
        if path is not None:
            raise ValueError(f"{folder} already holds {path.name}: continue it with --resume, or give another name=...")
        return None
    if path is None:
        raise ValueError(f"--resume: no complete checkpoint in {checkpoint.folder(folder)}; start without --resume")
    _check(_read(path / "state.pt"), run, path)
    return path


def load(t, path: Path) -> None:
    """Bring a freshly built trainer to the state of a checkpoint; ValueError for one that does not fit it."""
    values = _read(path / "state.pt")
    if t.ds.load_universal_checkpoint():
        raise ValueError("deepspeed: load_universal unpickles whatever a checkpoint names; resume without it")
    t.ds.checkpoint_engine.load = _read_deepspeed
    try:
        t.ds.load_checkpoint(str(path), tag="deepspeed")
        t.step = values["step"]
        t.scale.load_state_dict(values["scale"])
        with safetensors.safe_open(path / "weights.safetensors", "pt") as weights:
            for name in getattr(t.method, "sharded", ()):
                table = weights.get_slice(name)
                getattr(t.method, name).copy_(table[dist.share(table.get_shape()[0])])
        for hook, hook_state in zip(t.hooks, values["hooks"], strict=True):
            if hook_state:
                hook.load_state_dict(hook_state)
        file = path / f"rank_{dist.rank()}.pt"
        if file.exists():  # absent on ranks that joined since
            set_random_states(untrusted.read_pt(file), t.device)
    except (ValueError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # anything, from a file whose contents are of other types or shapes
        raise ValueError(f"{path} does not fit this run ({untrusted.one_line(error)}); start a new run with another "
                         "name=...") from error


def _read_deepspeed(path: str, map_location=None):
    """One of DeepSpeed's files on the CPU.  Its own reader unpickles, and so runs whatever code a file names."""
    return untrusted.read_pt(path, allow=(ZeroStageEnum, LossScaler, fragment_address))


def _read(path: Path) -> dict:
    """state.pt, whose fields everything else may trust."""
    values = untrusted.read_pt(path)
    fields = {"step": int, "scale": dict, "config": dict, "world": int, "hooks": list}
    if not isinstance(values, dict) or not all(isinstance(values.get(k), kind) for k, kind in fields.items()):
        raise ValueError(f"{path} is not the state of a run: it needs {', '.join(fields)}")
    return values


def _check(values: dict, run: Run, path: Path) -> None:
    if values["world"] != dist.world() and run.speed.zero:
        raise ValueError(f"{path} was written by {values['world']} ranks and ZeRO {run.speed.zero} cuts its state by "
                         f"rank: resume with {values['world']} ranks (now {dist.world()})")
    now = dump(run)
    for section in RESULTS:
        then, this = values["config"].get(section), now[section]
        if then != this:
            pairs = [(section, then, this)] if not isinstance(this, dict) else [
                (f"{section}.{k}", then.get(k), this.get(k)) for k in {*then, *this} if then.get(k) != this.get(k)]
            key, a, b = pairs[0]
            raise ValueError(f"--resume: {key} was {a!r} when {path.name} was written and is {b!r} now; "
                             "start a new run (name=...) or restore it")


def run_folder(run: Run) -> Path:
    return Path(run.log.root) / run.name


def write_config(t) -> None:
    if dist.is_main():
        t.folder.mkdir(parents=True, exist_ok=True)
        (t.folder / "config.json").write_text(dumps(t.run))


def note_environment(t) -> None:
    """Add to environment.json where the run is started, or continued: one entry each, with the step."""
    if not dist.is_main():
        return
    path, device = t.folder / "environment.json", t.device
    try:
        before = json.loads(path.read_text()) if t.step else []
    except (OSError, ValueError):  # a run of before this record, or killed while it was written
        before = []
    cuda = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    entry = {"step": t.step, "time": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()), "ranks": dist.world(),
             "accelerator": device.type,
             "device": f"{cuda.name}, {cuda.total_memory / 2**30:.0f} GiB" if cuda else _processor(),
             "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
             "system": platform.platform(), "python": platform.python_version(), "cuda": torch.version.cuda or "none",
             **{name: metadata.version(name) for name in ("fastssl", "torch", "torchvision", "ffcv", "deepspeed")}}
    path.write_text(json.dumps([*before, entry], indent=1) + "\n")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or an ARM core, which has no such line
        return platform.processor() or platform.machine()
