"""The script that launchers start:  deepspeed --num_gpus 8 fastssl/train.py CONFIG [a.b=value ...] [--resume]

`python`, `torchrun`, `srun` and `mpirun` work, too; `fastssl train` is the same in one process.  The default config is
configs/quickstart.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__" and sys.path[0] == str(Path(__file__).resolve().parent):
    del sys.path[0]  # started as a script: our own `config`, `views`, ... must not shadow other packages' modules

import argparse
import faulthandler
import os
import re
import socket
import traceback
from collections.abc import Callable
from typing import Literal

from fastssl import config, launcher
from fastssl.parsing import Parser, shorten_warnings


def parser(prog: str = "fastssl train") -> argparse.ArgumentParser:
    p = Parser(prog, description="Pretrain a backbone without labels.")
    p.add_argument("config", nargs="?", help="a config file (default: configs/quickstart.py)")
    p.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings that replace those of the file")
    p.add_argument("--resume", action="store_true", help="continue from the newest complete checkpoint of the run")
    p.add_argument(
        "--continue", action="store_true", help="--resume where the run has a checkpoint, else as without it"
    )
    p.add_argument("--resume-from", metavar="CHECKPOINT", help="continue from this checkpoint's folder")
    p.add_argument("--force", action="store_true", help="start anew, deleting the checkpoints of the folder")
    p.add_argument("--restarts", type=int, default=0, metavar="N", help="start again up to N times after a crash")
    p.add_argument("--deterministic", action="store_true", help="the same bits every time, slower")
    p.add_argument("--pretrained", help="backbone weights to start from")
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: CUDA if there is one")
    p.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # deepspeed's launcher adds it
    return p


def parse(argv: list[str] | None, prog: str = "fastssl train") -> argparse.Namespace:
    """The arguments; ValueError where CONFIG or a setting is wrong."""
    args = parser(prog).parse_intermixed_args(argv)
    if args.restarts < 0:
        raise ValueError(f"--restarts {args.restarts}: must be 0 or more")
    others = [f"--{name.replace('_', '-')}" for name in ("continue", "resume_from") if getattr(args, name)]
    if args.resume and others:
        raise ValueError(f"--resume and {' and '.join(others)}: give one of them")
    args.config, args.overrides = _config_and_overrides([*filter(None, [args.config]), *args.overrides])
    return args


def main(argv: list[str] | None = None) -> int:
    shorten_warnings()
    try:
        launcher.set_variables()
        args = parse(argv)
        if launcher.ranks() == 1:  # of several one reports a mistake (ending.report_failure)
            config.check(args.config or config.quickstart(), args.overrides)
    except ValueError as error:
        if os.environ.get("FASTSSL_TRACEBACK"):
            raise
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"fastssl: {error}", file=sys.stderr)
        return 2
    from fastssl import dist, ending  # torch: 2 s

    if args.restarts:
        return ending.supervise([sys.executable, __file__, *_without_restarts(argv)], args.restarts)

    config_file = args.config or config.quickstart()

    def work() -> None:
        if launcher.ranks() > 1:
            dist.init(args.device)  # at first, so that an error on one rank reaches the others
        run = config.load(config_file, args.overrides)
        run.deterministic |= args.deterministic
        run.backbone.pretrained = args.pretrained or run.backbone.pretrained
        choose_accelerator(args.device)
        from fastssl import engine  # DeepSpeed picks its accelerator when it is imported

        resume: bool | Literal["auto"] = "auto" if vars(args)["continue"] else args.resume
        engine.fit(
            run,
            resume=resume,
            resume_from=args.resume_from,
            force=args.force,
            device=args.device,
            config_file=config_file,
        )

    return guarded(work)


def choose_accelerator(device: str | None) -> None:
    """Before DeepSpeed is imported."""
    if not _uses_cuda(device):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def guarded(work: Callable[[], None]) -> int:
    """Call `work` on this rank of a launcher and return the exit code: an error is one line of the first rank that
    fails, and no rank waits for one that has ended."""
    from fastssl import dist, ending

    # CUDA reads it when it starts; --deterministic needs it
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if not faulthandler.is_enabled():  # a memory error of a library, or SIGBUS from a file that was cut short
        faulthandler.enable()
    launcher.set_variables()
    watch, code = ending.Watchdog(), 0
    try:
        work()
    except ending.Stopped as stopped:
        code = stopped.code
    except KeyboardInterrupt:
        code = _fail("interrupted; nothing was saved", ending.INTERRUPTED)
    except (ValueError, OSError) as error:
        if os.environ.get("FASTSSL_TRACEBACK"):
            raise
        code = _fail(_message(error), 2)
    except Exception as error:
        if dist.world() == 1:
            raise
        lost = watch.lost(error)
        code = _fail(lost, 1) if lost else _fail(f"{type(error).__name__}: {error}", 1, traceback.format_exc())
    finally:
        if code in (0, ending.REQUEUE, ending.INTERRUPTED):
            dist.barrier()  # no rank may look for another's failure after this
        watch.stop()
        dist.shutdown()
    return code


def _config_and_overrides(words: list[str]) -> tuple[str | None, list[str]]:
    """The config file, None where none is given, and the a.b=value, which may stand before it."""
    overrides = [word for word in words if re.match(r"[\w.]+=", word) and not Path(word).is_file()]
    others = [word for word in words if word not in overrides]
    if len(others) > 1:
        name, wrong = sorted(others[:2], key=lambda word: not word.endswith(".py"))
        what = "a second config file" if wrong.endswith(".py") else "not of the form a.b=value"
        raise ValueError(f"override {wrong!r} is {what}: give one config file ({name}) and settings as a.b=value")
    return others[0] if others else None, overrides


def _fail(reason: str, code: int, details: str = "") -> int:
    """Print the reason on the first rank that fails, and return its exit code.  With several ranks the process ends
    here: leaving a process group in which other ranks have ended would hang."""
    from fastssl import dist, ending

    first, code = ending.report_failure(reason, code)
    if first:
        where = f" (rank {dist.rank()} on {socket.gethostname()})" if dist.rank() else ""
        print(f"{details}fastssl: {reason}{where}", file=sys.stderr, flush=True)
    if dist.world() > 1:
        sys.stdout.flush()
        os._exit(code)
    return code


def _without_restarts(argv: list[str] | None) -> list[str]:
    argv = sys.argv[1:] if argv is None else argv
    values = {i + 1 for i, word in enumerate(argv) if word == "--restarts"}
    return [w for i, w in enumerate(argv) if i not in values and w != "--restarts" and not w.startswith("--restarts=")]


def _message(error: ValueError | OSError) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) if isinstance(error, OSError) else str(error)


def _uses_cuda(device: str | None) -> bool:
    import torch

    return torch.cuda.is_available() if device is None else device == "cuda"


if __name__ == "__main__":
    sys.exit(main())
