"""Which checkpoint a run continues from, and whether it may: what would change the result must be as before."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from fastssl import dist
from fastssl.checkpoint import disk, run_folder, state
from fastssl.config import Run, dump, with_defaults
from fastssl.trainer import Trainer

FIXED = ("method", "backbone", "data", "optim", "seed", "sync_bn")  # sections that a resumed run must share, ...
# ... without what only hooks read, and what acts only where a run would otherwise end
FREE = ("data.test", "data.bank", "data.eval_view", "optim.skip_nonfinite")
LENGTH = ("optim.epochs", "optim.steps")  # may change where lr and weight decay do not depend on the run's length


def find_checkpoint(
    run: Run,
    resume: bool | Literal["auto"],
    resume_from: str | Path | None = None,
    force: bool = False,
    config_file: str | Path | None = None,
) -> Path | None:
    """The checkpoint to continue from, None for a new run.  ValueError, on every rank and before anything is built,
    where `run` can neither start nor continue.

    The arguments are those of `engine.fit`."""
    return dist.on_main(_find, run, resume, resume_from, force, config_file)


def _find(
    run: Run,
    resume: bool | Literal["auto"],
    resume_from: str | Path | None,
    force: bool,
    config_file: str | Path | None,
) -> Path | None:
    folder = run_folder.path(run)
    existing = disk.list_checkpoints(folder)
    other = run_folder.other_config(run, config_file) if existing else None
    if other and force:
        raise ValueError(f"--force would delete the run of {other} in {folder}: give another name=..., or delete it")
    if resume and resume not in (True, "auto"):
        raise ValueError(f"resume={str(resume)!r} must be True, False or 'auto'; resume_from takes a checkpoint")
    if resume is True and resume_from is not None:
        raise ValueError(f"resume={resume!r} and resume_from={str(resume_from)!r}: give one of them")
    if resume_from is None and (not resume or (resume == "auto" and not existing)):
        if existing and not force:
            raise ValueError(_not_empty(folder, other))
        return None
    if resume and force:
        raise ValueError("--force starts anew and --resume and --continue continue: give one of them")
    if resume == "auto" and existing:
        resume_from = None
    path = disk.newest(folder) if resume_from is None else _complete(Path(resume_from))
    if path is None:
        hint = "start anew with --force, which deletes the damaged ones" if existing else "start without --resume"
        raise ValueError(f"cannot resume: no complete checkpoint in {disk.directory(folder)}; {hint}")
    newer = [p for p in existing if not disk.is_at_or_before(p, path)]
    if newer and not resume and not force:
        raise ValueError(
            f"{folder} holds {newer[0].name}, which does not lead to {path}: give another name=..., or "
            "delete it with --force"
        )
    check_compatible(state.read(path), run, path)
    return path


def _not_empty(folder: Path, other: Path | None) -> str:
    path = disk.newest(folder)
    if path and other:
        return f"{folder} already holds {path.name} of {other}: give another name=..."
    what = (
        f"already holds {path.name}: continue it with --resume"
        if path
        else "holds damaged checkpoints only, from which --resume cannot continue: repair one"
    )
    return (
        f"{folder} {what}, give another name=..., or start anew with --force, which deletes its checkpoints and its log"
    )


def _complete(path: Path) -> Path:
    if problem := disk.damage(path):
        raise ValueError(
            f"--resume-from {path}: not a complete checkpoint ({problem}); they are the folders "
            "checkpoints/step_... of a run"
        )
    return path


def check_compatible(values: dict, run: Run, path: Path) -> None:
    """ValueError where `run` cannot continue from a checkpoint with the `values` of state.pt."""
    for section in FIXED:
        for key, saved, value in _differences(section, values["config"].get(section), getattr(run, section)):
            if key in FREE or (key in LENGTH and is_independent_of_length(run)):
                continue
            longer = (
                f"; optim.schedule={run.optim.schedule!r} follows the run's length, so train longer in a new "
                "run that starts from this one's weights (backbone.pretrained)"
                if key in LENGTH
                else ""
            )
            raise ValueError(
                f"--resume: {key} was {saved!r} when {path.name} was written and is {value!r} now; "
                f"start a new run (name=...) or restore it{longer}"
            )


def describe_changes(t: Trainer, path: Path) -> list[str]:
    """Lines about what differs from the checkpoint `path`, which `t` has loaded: ranks, ZeRO stage, length.  ValueError
    where the run was to end before the checkpoint."""
    values, lines = state.read(path), []
    saved = with_defaults(values["config"].get("optim"), t.run.optim)
    before = saved["steps"] or saved["epochs"] * t.loader.steps
    if t.total_steps < t.step:
        raise ValueError(
            f"--resume: {path.name} is at step {t.step}, and optim.epochs={t.run.optim.epochs}, "
            f"optim.steps={t.run.optim.steps} end the run after step {t.total_steps}: a run can be lengthened only"
        )
    if t.total_steps != before:
        lines.append(
            f"the run ends after step {t.total_steps} instead of {before:g}; learning rate and weight decay of every "
            f"step stay as they were (optim.schedule={t.run.optim.schedule})"
        )
    stage = values["config"]["speed"].get("zero", 0)
    if (values["world"], stage) != (dist.world(), t.run.speed.zero):
        lines.append(
            f"{path.name} was written by {values['world']} rank(s) at ZeRO {stage}; now {dist.world()} at ZeRO "
            f"{t.run.speed.zero}: the same state, random numbers of dropout may differ"
        )
    return lines


def _differences(section: str, saved: Any, now: Any) -> list[tuple[str, object, object]]:
    """(key, saved value, value now) of the settings of a section that differ."""
    saved, now = with_defaults(saved, now), dump(now)
    if saved == now:
        return []
    if not isinstance(now, dict) or not isinstance(saved, dict):
        return [(section, saved, now)]
    keys = [key for key in sorted({*saved, *now}) if saved.get(key) != now.get(key)]
    return [(f"{section}.{key}", saved.get(key), now.get(key)) for key in keys]


def is_independent_of_length(run: Run) -> bool:
    """Whether a step's lr, weight decay and momentum of the method are the same in a longer run."""
    momentum = getattr(run.method, "momentum", None)
    return (
        run.optim.schedule in ("constant", "step")
        and run.optim.weight_decay_end is None
        and getattr(run.method, "momentum_end", momentum) in (None, momentum)
    )
