"""Saving and loading the state of a run: parameters and optimizer by DeepSpeed, everything else beside them.

A checkpoint folder holds `deepspeed/` (all ZeRO stages), `weights.safetensors` (the whole method, for evaluation and
export at any stage), `state.pt` (step, loss scale, hooks, config) and `rank_R.pt` (random states).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from fastssl import backbones, dist, zero
from fastssl.checkpoint import store
from fastssl.config import dump
from fastssl.files import untrusted
from fastssl.sharded_table import ShardedTable
from fastssl.trainer import Trainer


def save(t: Trainer) -> Path | None:
    """Write a complete checkpoint; returns its folder on rank 0.  ValueError where the disk cannot hold it."""
    dist.sync_buffers(t.method)
    path = dist.on_main(store.create, t.folder, t.step)
    try:
        _write(t, path)
    except Exception as error:  # torch's and safetensors' errors hide that the disk is full
        problem = _disk_error(path)
        if problem is None:
            raise
        raise problem from error
    dist.barrier()
    return dist.on_main(store.commit, path, t.run.log.keep, round(t.run.log.keep_every * t.loader.steps))


def _write(t: Trainer, path: Path) -> None:
    t.ds.save_checkpoint(str(path), tag="deepspeed", save_latest=False)
    torch.save(random_states(t.device), path / f"rank_{dist.rank()}.pt")
    weights = zero.full_state_dict(t.method)
    if dist.is_main():
        safetensors.torch.save_file({k: v.cpu() for k, v in weights.items()}, path / "weights.safetensors")
        torch.save(
            {
                "step": t.step,
                "scale": t.scale.state_dict(),
                "config": dump(t.run),
                "world": dist.world(),
                "hooks": {name: h.state_dict() for name, h in _named(t.hooks) if hasattr(h, "state_dict")},
            },
            path / "state.pt",
        )


def _disk_error(path: Path) -> ValueError | None:
    """The error of a small write into the unfinished checkpoint `path`, which is then removed; None: it succeeds."""
    try:
        with open(path / f"probe_{dist.rank()}", "wb") as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
        return None
    except OSError as error:
        shutil.rmtree(path, ignore_errors=True)
        last = next((p.name for p in store.list_checkpoints(path.parent.parent)), "none")
        return ValueError(f"{path.parent}: {error.strerror}; the newest complete checkpoint is {last}")


def load(t: Trainer, path: Path) -> list[str]:
    """Bring a newly built trainer to the state of a checkpoint.  Returns a line for each hook that differs; ValueError
    for a checkpoint that does not fit the run."""
    values = read(path)
    if t.ds.load_universal_checkpoint():
        raise ValueError("deepspeed: load_universal unpickles a checkpoint without checks; resume without it")
    t.ds.checkpoint_engine.load = _read_deepspeed
    try:
        t.ds.load_checkpoint(str(path), tag="deepspeed")
        t.step = values["step"]
        t.scale.load_state_dict(values["scale"])
        with safetensors.safe_open(path / "weights.safetensors", "pt") as weights:
            for name, module in t.method.named_modules():
                if isinstance(module, ShardedTable):
                    module.load_(weights.get_slice(name))
        _convert_memory_format(t, values["config"]["speed"].get("channels_last"))
        notes = _load_hooks(t.hooks, values["hooks"], path)
        file = path / f"rank_{dist.rank()}.pt"
        if file.exists():  # absent for ranks that the run has gained
            set_random_states(untrusted.read_pt(file), t.device)
    except (ValueError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # any type, from a file whose contents have other types or shapes
        raise ValueError(
            f"{path} does not fit this run ({untrusted.one_line(error)}); start a new run with another name=..."
        ) from error
    return notes


def read(path: Path) -> dict:
    """state.pt of a checkpoint, with the types of its fields checked."""
    values = untrusted.read_pt(path / "state.pt")
    fields = {"step": int, "scale": dict, "config": dict, "world": int, "hooks": dict}
    if (
        not isinstance(values, dict)
        or not all(isinstance(values.get(k), kind) for k, kind in fields.items())
        or not isinstance(values["config"].get("speed"), dict)
    ):
        raise ValueError(f"{path / 'state.pt'} is not the state of a run: it needs {', '.join(fields)}")
    return values


def _read_deepspeed(path: str, map_location: str | torch.device | None = None) -> Any:
    """One of DeepSpeed's files, on the CPU.  DeepSpeed's own reader would run code that a file names."""
    # late: DeepSpeed picks its accelerator when it is imported
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return untrusted.read_pt(path, allow=(ZeroStageEnum, LossScaler, fragment_address))


def _load_hooks(hooks: list, saved: dict, path: Path) -> list[str]:
    """Load each hook's state by its name.  Returns a line for each hook without a saved state and for saved states
    without a hook."""
    notes = []
    for name, hook in _named(hooks):
        if name in saved:
            hook.load_state_dict(saved[name])
        elif hasattr(hook, "load_state_dict"):
            notes.append(f"the hook {name} is not in {path.name} and starts anew")
    gone = saved.keys() - dict(_named(hooks))
    if gone:
        notes.append(f"hooks of {path.name} that are no longer there: {', '.join(sorted(gone))}")
    return notes


def _named(hooks: list) -> list[tuple[str, Any]]:
    """Hooks with the names of their classes; "Name#1" is the second of its class."""
    names = [type(hook).__qualname__ for hook in hooks]
    return [(f"{n}#{k}" if (k := names[:i].count(n)) else n, h) for i, (n, h) in enumerate(zip(names, hooks))]


@torch.no_grad()
def _convert_memory_format(t: Trainer, channels_last: bool) -> None:
    """Permute the optimizer's state of convolutions that was saved with the other `speed.channels_last` (ZeRO 0)."""
    if channels_last == t.run.speed.channels_last:
        return
    order = (0, 2, 3, 1) if t.run.speed.channels_last else (0, 3, 1, 2)
    for m in t.method.modules():
        if type(m) is (backbones.Conv2d if t.run.speed.channels_last else nn.Conv2d):
            state = t.ds.optimizer.state.get(m.weight, {})
            state.update(
                {k: v.permute(order).contiguous() for k, v in state.items() if isinstance(v, Tensor) and v.ndim == 4}
            )


def random_states(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def set_random_states(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
