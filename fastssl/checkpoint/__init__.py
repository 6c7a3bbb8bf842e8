"""Saving and resuming a run: parameters and optimizer by DeepSpeed, everything else beside them.

A checkpoint folder holds `deepspeed/` (all ZeRO stages), `weights.safetensors` (the whole method, for evaluation and
export whatever the stage), `state.pt` (step, loss scale, hooks, config) and `rank_R.pt` (random states).
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from fastssl import backbones, dist, files, zero
from fastssl.checkpoint import folder as checkpoint
from fastssl.config import Run, dump, dumps, with_defaults
from fastssl.files import untrusted

RESULTS = ("method", "backbone", "data", "optim", "seed", "sync_bn")  # sections that a resumed run must share, ...
OBSERVED = ("data.test", "data.bank", "data.eval_view")  # ... without what only the monitors read
LENGTH = ("optim.epochs", "optim.steps")  # may change where lr and weight decay do not depend on the run's length


def random_states(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def set_random_states(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def save(t) -> Path | None:
    """Write a complete checkpoint of a trainer; returns its folder on rank 0."""
    dist.sync_buffers(t.method)
    path = dist.on_main(checkpoint.begin, t.folder, t.step)
    try:
        _write(t, path)
    except Exception as error:  # torch's and safetensors' errors hide that the disk is full
        problem = _disk_error(path)
        if problem is None:
            raise
        raise problem from error
    dist.barrier()
    return dist.on_main(checkpoint.commit, path, t.run.log.keep, round(t.run.log.keep_every * t.loader.steps))


def _write(t, path: Path) -> None:
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
    """What keeps a file from being written into the unfinished checkpoint `path`, then removed; None: nothing."""
    try:
        with open(path / f"probe_{dist.rank()}", "wb") as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
        return None
    except OSError as error:
        shutil.rmtree(path, ignore_errors=True)
        last = next((p.name for p in checkpoint.found(path.parent.parent)), "none")
        return ValueError(f"{path.parent}: {error.strerror}; the newest complete checkpoint is {last}")


@contextlib.contextmanager
def claimed(run: Run) -> Iterator[None]:
    """Keep other processes out of the run's folder; ValueError on every rank where one is in it."""
    with contextlib.ExitStack() as held:
        dist.on_main(lambda: held.enter_context(checkpoint.lock(run_folder(run))))
        yield


def find(run: Run, resume: bool | str | Path, force: bool = False, say=print) -> Path | None:
    """The checkpoint to continue from, or None to begin; every reason why `run` cannot is a ValueError here, on every
    rank, before anything is built.  `resume`: True is the newest complete checkpoint; `force`: what the folder holds
    beyond it may be deleted."""
    return dist.on_main(_find, run, resume, force, say)


def _find(run: Run, resume: bool | str | Path, force: bool, say) -> Path | None:
    folder, there = run_folder(run), checkpoint.found(run_folder(run))
    if not resume:
        if there and not force:
            path = checkpoint.newest(folder, say)
            what = (
                f"already holds {path.name}: continue it with --resume"
                if path
                else "holds damaged checkpoints only, from which --resume cannot continue: mend one"
            )
            raise ValueError(
                f"{folder} {what}, give another name=..., or start anew with --force, which deletes its "
                "checkpoints and its log"
            )
        return None
    if resume is True and force:
        raise ValueError("--force starts anew and --resume continues: give one of them")
    path = checkpoint.newest(folder, say) if resume is True else _sound(Path(resume))
    if path is None:
        raise ValueError(
            f"--resume: no complete checkpoint in {checkpoint.folder(folder)}; start without --resume"
            + ", but with --force, which deletes the damaged ones" * bool(there)
        )
    newer = [p for p in there if path.parent.resolve() != p.parent.resolve() or p.name > path.name]
    if newer and resume is not True and not force:
        raise ValueError(
            f"{folder} holds {newer[0].name}, which does not lead to {path}: give another name=..., or "
            "delete it with --force"
        )
    _check(_read(path / "state.pt"), run, path)
    return path


def _sound(path: Path) -> Path:
    problem = checkpoint.damage(path)
    if problem:
        raise ValueError(
            f"--resume-from {path}: not a complete checkpoint ({problem}); they are the folders "
            "checkpoints/step_... of a run"
        )
    return path


def begin(t, path: Path | None = None, clear: bool = True) -> None:
    """Make the folder that of this run.  With `clear`, checkpoints that do not lead to `path` are deleted (all if it is
    None), as `find` has allowed."""
    if dist.is_main():
        t.folder.mkdir(parents=True, exist_ok=True)
        for old in checkpoint.found(t.folder) if clear else ():
            if path is None or old.parent.resolve() != path.parent.resolve() or old.name > path.name:
                shutil.rmtree(old)
        (t.folder / "config.json").write_text(dumps(t.run))
    dist.barrier()


def load(t, path: Path, say=print) -> None:
    """Bring a freshly built trainer to the state of a checkpoint; ValueError for one that does not fit it.
    `say` is told of hooks that differ."""
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
                getattr(t.method, name).copy_(table[dist.shard(table.get_shape()[0])])
        _layout(t, values["config"]["speed"].get("channels_last"))
        _load_hooks(t.hooks, values["hooks"], path, say)
        file = path / f"rank_{dist.rank()}.pt"
        if file.exists():  # absent on ranks that joined since
            set_random_states(untrusted.read_pt(file), t.device)
    except (ValueError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # anything, from a file whose contents are of other types or shapes
        raise ValueError(
            f"{path} does not fit this run ({untrusted.one_line(error)}); start a new run with another name=..."
        ) from error


def _read_deepspeed(path: str, map_location=None):
    """One of DeepSpeed's files on the CPU.  Its own reader unpickles, and so runs whatever code a file names."""
    # late: DeepSpeed picks its accelerator when it is imported, and reading weights needs this package, too
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return untrusted.read_pt(path, allow=(ZeroStageEnum, LossScaler, fragment_address))


def _read(path: Path) -> dict:
    """state.pt, whose fields everything else may trust."""
    values = untrusted.read_pt(path)
    fields = {"step": int, "scale": dict, "config": dict, "world": int, "hooks": dict}
    if (
        not isinstance(values, dict)
        or not all(isinstance(values.get(k), kind) for k, kind in fields.items())
        or not isinstance(values["config"].get("speed"), dict)
    ):
        raise ValueError(f"{path} is not the state of a run: it needs {', '.join(fields)}")
    return values


def _load_hooks(hooks: list, saved: dict, path: Path, say) -> None:
    """Give every hook the state of its name; one without a saved state starts anew."""
    for name, hook in _named(hooks):
        if name in saved:
            hook.load_state_dict(saved[name])
        elif hasattr(hook, "load_state_dict"):
            say(f"the hook {name} is not in {path.name} and starts anew")
    gone = saved.keys() - dict(_named(hooks))
    if gone:
        say(f"hooks of {path.name} that are no longer there: {', '.join(sorted(gone))}")


def _named(hooks: list) -> list[tuple[str, Any]]:
    """Hooks with the names of their classes; "Name#1" is the second of its class."""
    names = [type(hook).__qualname__ for hook in hooks]
    return [(f"{n}#{k}" if (k := names[:i].count(n)) else n, h) for i, (n, h) in enumerate(zip(names, hooks))]


@torch.no_grad()
def _layout(t, channels_last: bool) -> None:
    """Turn what the optimizer holds for convolutions that were saved in another layout (ZeRO 0; `_check`)."""
    if channels_last == t.run.speed.channels_last:
        return
    order = (0, 2, 3, 1) if t.run.speed.channels_last else (0, 3, 1, 2)
    for m in t.method.modules():
        if type(m) is (backbones.Conv2d if t.run.speed.channels_last else nn.Conv2d):
            held = t.ds.optimizer.state.get(m.weight, {})
            held.update(
                {k: v.permute(order).contiguous() for k, v in held.items() if isinstance(v, Tensor) and v.ndim == 4}
            )


def _check(values: dict, run: Run, path: Path) -> None:
    then, now = values["config"]["speed"], run.speed
    zero, layout = then.get("zero"), then.get("channels_last")
    if zero != now.zero:
        raise ValueError(
            f"--resume: {path.name} was written at ZeRO {zero} and speed.zero={now.zero} now: each stage "
            f"cuts the optimizer's state differently; continue with speed.zero={zero}"
        )
    if now.zero and layout != now.channels_last:
        raise ValueError(
            f"--resume: {path.name} was written with speed.channels_last={layout}, whose layout ZeRO "
            f"{now.zero} has cut: continue with it (ZeRO 0 can change it)"
        )
    if values["world"] != dist.world() and run.speed.zero:
        raise ValueError(
            f"{path} was written by {values['world']} ranks and ZeRO {run.speed.zero} cuts its state by "
            f"rank: resume with {values['world']} ranks (now {dist.world()})"
        )
    now = dump(run)
    for section in RESULTS:
        then, this = with_defaults(values["config"].get(section), getattr(run, section)), now[section]
        if then != this:
            pairs = (
                [(section, then, this)]
                if not isinstance(this, dict)
                else [
                    (f"{section}.{k}", then.get(k), this.get(k))
                    for k in sorted({*then, *this})
                    if then.get(k) != this.get(k)
                ]
            )
            for key, a, b in pairs:
                if key in OBSERVED or (key in LENGTH and any_length(run)):
                    continue
                longer = (
                    f"; optim.schedule={run.optim.schedule!r} follows the run's length, so train longer in a new "
                    "run that starts from this one's weights (backbone.pretrained)"
                    if key in LENGTH
                    else ""
                )
                raise ValueError(
                    f"--resume: {key} was {a!r} when {path.name} was written and is {b!r} now; "
                    f"start a new run (name=...) or restore it{longer}"
                )


def any_length(run: Run) -> bool:
    """Whether a step's lr, weight decay and the method's momentum are the same in a longer run."""
    momentum = getattr(run.method, "momentum", None)
    return (
        run.optim.schedule in ("constant", "step")
        and run.optim.weight_decay_end is None
        and getattr(run.method, "momentum_end", momentum) in (None, momentum)
    )


def run_folder(run: Run) -> Path:
    return Path(run.log.root) / run.name


def note_environment(t) -> None:
    """Add to environment.json where the run is started, or continued: one entry each, with the step."""
    if not dist.is_main():
        return
    path, device = t.folder / "environment.json", t.device
    try:
        before = untrusted.read_json(path) if t.step else []
    except ValueError:  # a run of before this record, or killed while it was written
        before = []
    before = [entry for entry in before if isinstance(entry, dict)] if isinstance(before, list) else []
    cuda = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    entry = {
        "step": t.step,
        "time": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "ranks": dist.world(),
        "accelerator": device.type,
        "device": f"{cuda.name}, {cuda.total_memory / 2**30:.0f} GiB" if cuda else _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda or "none",
        **{name: metadata.version(name) for name in ("fastssl", "torch", "torchvision", "ffcv", "deepspeed")},
    }
    files.write_json(path, [*before, entry])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or an ARM core, which has no such line
        return platform.processor() or platform.machine()
