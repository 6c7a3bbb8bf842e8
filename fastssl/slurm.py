"""`fastssl slurm CONFIG --nodes N`: write an sbatch script that trains on N nodes, and submit it.

The ranks get SIGUSR1 before the time limit and SIGTERM at a preemption, write a checkpoint and end with exit code 75;
the script then queues the job again, and it resumes (docs/clusters.md).
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from fastssl import files
from fastssl.parsing import Parser, run_command

# Options of sbatch that are set here, with the option of `fastssl slurm` that sets them
SET_HERE: dict[str, str | None] = {
    "nodes": "--nodes",
    "ntasks": "--nodes and --ranks-per-node",
    **dict.fromkeys(("ntasks-per-node", "tasks-per-node"), "--ranks-per-node"),
    "cpus-per-task": "--cpus-per-rank",
    "partition": "--partition",
    "time": "--time",
    "account": "--account",
    "job-name": "--job-name",
    "signal": "--grace",
    "output": "log.root=FOLDER",
    **dict.fromkeys(("array", "open-mode", "requeue", "no-requeue", "parsable", "test-only", "wait", "wrap")),
}
# Options that replace --gpus-per-node
REQUESTS_GPUS = ("gres", "gpus", "gpus-per-node", "gpus-per-socket", "gpus-per-task", "tres-per-task")
TIME = re.compile(r"\d+(:\d\d){0,2}|\d+-\d+(:\d\d){0,2}")  # M, M:S, H:M:S, D-H, D-H:M, D-H:M:S
NAME = re.compile(r"[\w.,/@+-]+")
# Characters of an #SBATCH line that sbatch reads as they are; with quotes around them also spaces
PLAIN = re.compile(r"[\w.,:;=/@%+*&|!?~^(){}\[\]<>-]*")

SCRIPT = """\
#!/bin/bash
# Written by fastssl {version}; `sbatch FILE` submits it again.
{options}

cd -- {folder} || exit
saved={marker}-"$SLURM_JOB_ID".saved # the run creates it with its first checkpoint
if [ "${{SLURM_RESTART_COUNT:-0}}" -eq 0 ]; then
    rm -f -- "$saved"
fi
if [ -e "$saved" ]; then # queued again
    arguments=({again})
else
    arguments=({train})
fi
srun {srun} env {variable}="$saved" {python} -m fastssl.train "${{arguments[@]}}"
code=$?
if [ "$code" -eq {requeue} ]; then # stopped by a signal, with a checkpoint
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def parser() -> argparse.ArgumentParser:
    p = Parser(
        "fastssl slurm",
        usage="fastssl slurm CONFIG [a.b=value ...] [options of fastssl train] [--nodes N] [...]",
        description="Write an sbatch script for a run on one or more nodes, and submit it.  CONFIG, settings and\n"
        "options such as --resume are those of `fastssl train`.  A job that is stopped by its time limit\nor preempted "
        "queues itself again and resumes.",
    )
    p.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes of the job")
    p.add_argument("--ranks-per-node", type=int, default=8, metavar="N", help="processes on a node, each with a GPU")
    p.add_argument("--cpus-per-rank", type=int, default=8, metavar="N", help="CPU cores of a rank, which decode images")
    p.add_argument("--partition", type=_name)
    p.add_argument("--account", type=_name)
    p.add_argument("--job-name", type=_name, help="default: the run's name")
    p.add_argument("--time", type=_time, help="limit of one start, such as 30 (minutes), 12:00:00 or 2-12:00:00")
    p.add_argument(
        "--grace", type=int, default=180, metavar="SECONDS", help="for the last checkpoint, before the time limit"
    )
    p.add_argument(
        "--sbatch",
        type=_option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another option of sbatch, such as qos=high or exclusive; can be repeated",
    )
    p.add_argument("--dry-run", action="store_true", help="print the script; write and submit nothing")
    return p


def main(argv: list[str] | None = None) -> int:
    args, train = parser().parse_known_args(argv)

    def work() -> None:
        folder, text = script(args, train)
        if args.dry_run:
            print(text, end="")
        else:
            submit(folder, text)

    return run_command("slurm", work)


def script(args: argparse.Namespace, train: list[str]) -> tuple[Path, str]:
    """(run folder, sbatch script) of a run with the arguments `train` of `fastssl train`.  ValueError for a value that
    sbatch or the config does not allow."""
    from fastssl import config
    from fastssl.ending import REQUEUE, SAVED, continue_command
    from fastssl.train import parse

    options = parse(train, "fastssl slurm")
    run = config.load(options.config or config.quickstart(), options.overrides)
    check(args, run.optim.batch)
    folder = (Path(run.log.root) / run.name).absolute()
    srun = ["--kill-on-bad-exit=0", f"--wait={args.grace}", "--distribution=block"]
    return folder, SCRIPT.format(
        version=version("fastssl"),
        options="\n".join(f"#SBATCH --{line}" for line in sbatch_options(args, run.name, folder, options.device)),
        folder=shlex.quote(str(Path.cwd())),
        marker=shlex.quote(f"{folder}/slurm"),
        variable=SAVED,
        srun=shlex.join([*srun, f"--cpus-per-task={args.cpus_per_rank}"]),
        python=shlex.quote(sys.executable),
        train=shlex.join(train),
        again=shlex.join(continue_command(train)),
        requeue=REQUEUE,
    )


def check(args: argparse.Namespace, batch: int) -> None:
    """ValueError for numbers out of range."""
    for name in ("nodes", "ranks_per_node", "cpus_per_rank", "grace"):
        if not 1 <= getattr(args, name) <= 65535:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: a number from 1 to 65535")
    ranks = args.nodes * args.ranks_per_node
    if batch % ranks:
        raise ValueError(
            f"optim.batch={batch} is not a multiple of the {ranks} ranks ({args.nodes} nodes of "
            f"{args.ranks_per_node}): change it, --nodes or --ranks-per-node"
        )
    if args.time and 0 < _seconds(args.time) <= args.grace:
        raise ValueError(
            f"--time {args.time} is not longer than --grace {args.grace}, the seconds before its end at "
            "which the last checkpoint is written"
        )


def _seconds(time: str) -> int:
    """A time limit of sbatch in seconds; 0: none."""
    days, dash, clock = time.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if dash:  # hours, minutes, seconds
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, minutes, seconds = [0, *parts, 0][:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def sbatch_options(args: argparse.Namespace, name: str, folder: Path, device: str | None) -> list[str]:
    """The options of the script, without the dashes."""
    extra = [option.partition("=")[0] for option in args.sbatch]
    for option in extra:
        if option in SET_HERE:
            instead = f"use {SET_HERE[option]}" if SET_HERE[option] else "it would break queueing again and resuming"
            raise ValueError(f"--sbatch {option}: `fastssl slurm` sets it; {instead}")
        known = [name for name in (*SET_HERE, *REQUESTS_GPUS) if name.startswith(option)]
        if known and option not in REQUESTS_GPUS:  # sbatch accepts abbreviations
            raise ValueError(f"--sbatch {option}: write the whole name of the option, such as {known[0]}")
    lines = [
        f"job-name={_quoted(args.job_name or name)}",
        f"nodes={args.nodes}",
        f"ntasks-per-node={args.ranks_per_node}",
        f"cpus-per-task={args.cpus_per_rank}",
    ]
    if device != "cpu" and not any(option in REQUESTS_GPUS for option in extra):
        lines.append(f"gpus-per-node={args.ranks_per_node}")
    lines += [f"{key}={value}" for key in ("partition", "account", "time") if (value := getattr(args, key))]
    lines += [
        f"output={_quoted(str(folder).replace('%', '%%') + '/slurm-%j.out')}",
        "open-mode=append",  # queued again, the job writes to the same file
        "requeue",
        f"signal=USR1@{args.grace}",  # to the ranks, not to the script
    ]
    return lines + args.sbatch


def submit(folder: Path, text: str) -> None:
    """Write the script to the run folder and submit it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "slurm.sh"
    with files.atomic_write(file) as new:
        new.write_text(text)
    try:
        done = subprocess.run(["sbatch", "--parsable", str(file)], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ValueError(f"sbatch not found: submit {file} on a login node of the cluster by `sbatch {file}`") from None
    if done.returncode:
        raise ValueError(f"sbatch {file}: {' '.join(done.stderr.split())}")
    job = done.stdout.strip().partition(";")[0]
    print(f"job {job} is queued: {file}; output: {folder}/slurm-{job}.out")


def _quoted(text: str) -> str:
    """`text` as the value of an option on an #SBATCH line."""
    if PLAIN.fullmatch(text):
        return text
    if PLAIN.fullmatch(text.replace(" ", "")):
        return f'"{text}"'
    raise ValueError(f"{text!r}: an #SBATCH line cannot hold the character {re.sub(PLAIN, '', text).strip()[:1]!r}")


def _name(text: str) -> str:
    if not NAME.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r}: letters, digits and . , / @ + - _")
    return text


def _time(text: str) -> str:
    if not TIME.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r}: minutes, or such as 12:00:00 or 2-12:00:00")
    return text


def _option(text: str) -> str:
    name, equals, value = text.removeprefix("--").partition("=")
    if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
        raise argparse.ArgumentTypeError(f"{text!r}: NAME=VALUE with a long option of sbatch, such as qos=high")
    try:
        return f"{name}{equals}{_quoted(value)}"
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
