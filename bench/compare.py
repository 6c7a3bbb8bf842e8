"""Compare the speed of two commits or settings, measured in alternating blocks of steps:
python bench/compare.py A B [--config configs/simclr/r18_cifar10_200ep.py] [a.b=value ...]

A and B are each a commit (any name that git resolves), a list of settings (speed.graph=on,speed.compile=on), or both
(main:speed.graph=on); "." is this checkout with its changes. Both use the config file of this checkout and run the loop
of bench/step.py on its data, each in a separate process that waits while the other one measures. A side is faster if
its slowest block is faster than the fastest block of the other side; otherwise there is "no difference beyond the
spread".
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from common import ROOT, append, environment, parser_with_dry, spread

WORKER = "import sys, step; step.serve(sys.argv[1], sys.argv[2:])"  # bench/step.py of the side's own checkout


@dataclass(frozen=True)
class Side:
    text: str
    commit: str | None  # None: this checkout with its changes
    settings: tuple[str, ...]


def side(text: str) -> Side:
    """A Side from "COMMIT", "a.b=value,c.d=value" or "COMMIT:a.b=value"."""
    if "=" in text:
        commit, _, settings = text.partition(":") if ":" in text.partition("=")[0] else ("", "", text)
    else:
        commit, settings = text, ""
    return Side(text, None if commit in ("", ".") else _resolve(commit), tuple(s for s in settings.split(",") if s))


def _resolve(name: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--verify", "--quiet", name + "^{commit}"], capture_output=True, text=True
    )
    if done.returncode:
        raise ValueError(f"{name!r} is neither a commit of this repository nor a list of settings a.b=value")
    return done.stdout.strip()


def packages(tree: Path, folder: Path) -> Path:
    """Make `folder`, for PYTHONPATH, with a package `fastssl` of links into the checkout `tree`."""
    inside = folder / "fastssl"
    inside.mkdir(parents=True)
    for path in (tree / "fastssl").iterdir():
        if path.name != "__pycache__":
            (inside / path.name).symlink_to(path)
    for name in ("kernels", "data_prep", "configs"):  # as setup.py maps them
        (inside / name).symlink_to(tree / name)
    return folder


class Worker:
    """A process that runs the steps of one side; `block` makes it run some and returns (images/s, last loss)."""

    def __init__(self, s: Side, tree: Path, config: str, overrides: list[str], folder: Path):
        self.log = folder / "log.txt"
        path = os.pathsep.join([str(packages(tree, folder / "site")), str(tree / "bench")])
        with self.log.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", WORKER, config, *overrides, *s.settings],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "PYTHONPATH": path},
            )
        assert self.process.stdin and self.process.stdout, "both are pipes"
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self._answer("READY")

    def block(self, steps: int) -> tuple[float, float]:
        self.stdin.write(f"{steps}\n")
        self.stdin.flush()
        rate, loss = json.loads(self._answer("RATE"))
        return rate, loss

    def _answer(self, word: str) -> str:
        for line in self.stdout:
            if line.startswith(word):
                return line[len(word) :]
        self.process.wait()
        end = [line for line in self.log.read_text().splitlines() if line.strip()][-1:]
        raise ValueError(f"the process ended with exit status {self.process.returncode}: {' '.join(end)[:300]}")

    def close(self) -> None:
        self.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def verdict(a: list[float], b: list[float]) -> str:
    """A sentence that compares the rates of the blocks of both sides.

    If both were equally fast, all blocks of one side would be faster than all of the other with probability 2 / C(2n,
    n): 10 % for three blocks a side, 3 % for four, 0.2 % for six.
    """
    ratio = statistics.median(b) / statistics.median(a)
    chance = 2 / math.comb(len(a) + len(b), len(a))
    measured = f"B / A = {ratio:.3f} (medians of {len(a)} and {len(b)} blocks)"
    if min(len(a), len(b)) < 4:
        return f"{measured}; no verdict from fewer than four blocks a side"
    for name, low, high in (("B", a, b), ("A", b, a)):
        if min(high) > max(low):
            return (
                f"{measured}; {name} is faster: its slowest block is faster than the other's fastest "
                f"(by chance with a probability of {100 * chance:.2g} %)"
            )
    return f"{measured}; no difference beyond the spread"


def main() -> int:
    parser = parser_with_dry(__doc__)
    parser.add_argument("a", metavar="A")
    parser.add_argument("b", metavar="B")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="for both sides")
    parser.add_argument("--config", default=str(ROOT / "configs/simclr/r18_cifar10_200ep.py"))
    parser.add_argument("--steps", type=int, default=30, help="counted steps of a block")
    parser.add_argument("--blocks", type=int, default=6, help="of each side; four or more for a verdict")
    parser.add_argument("--seconds", type=float, default=400, help="after which no block is started")
    args = parser.parse_intermixed_args()
    start, env = time.perf_counter(), environment("triton", "deepspeed")
    losses: dict[int, float] = {}
    rates: list[list[float]] = [[], []]
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as cleanup:
            workers, sides = [], [side(args.a), side(args.b)]
            for name, s in zip("AB", sides):
                side_folder, tree = Path(folder, name), ROOT
                side_folder.mkdir()
                if s.commit:
                    tree = side_folder / "tree"
                    cleanup.callback(_git, "worktree", "remove", "--force", str(tree))
                    _git("worktree", "add", "--detach", "--force", str(tree), s.commit)
                try:
                    workers.append(Worker(s, tree, args.config, args.overrides, side_folder))
                except ValueError as error:
                    raise ValueError(f"{name} ({s.text}): {error}") from None
                cleanup.callback(workers[-1].close)
            for worker in workers:
                worker.block(5)  # warm-up: compilation, tuning, capture, caches
            for i in range(args.blocks):
                if time.perf_counter() - start > args.seconds:
                    break
                for k in (0, 1) if i % 2 == 0 else (1, 0):  # ABBA: a drift of the machine affects both sides alike
                    rate, losses[k] = workers[k].block(args.steps)
                    rates[k].append(rate)
        if not rates[0]:
            raise ValueError(f"--seconds {args.seconds:g} ended before the first block: give more")
    except ValueError as error:
        print(f"bench/compare.py: {error}", file=sys.stderr)
        return 2
    results = {}
    for k, (name, s) in enumerate(zip("AB", sides)):
        r = spread(rates[k])
        results[name] = {
            "side": s.text,
            "commit": s.commit or env["commit"],
            "settings": s.settings,
            "images_per_s": r,
            "last_loss": losses[k],
        }
        print(
            f"{name} {s.text}: {r['median']} images/s ({r['min']} to {r['max']}, n={r['n']}), last loss {losses[k]:.6g}"
        )
    conclusion = verdict(*rates)
    print(conclusion)
    if not args.dry:
        where = append("compare", env, config=args.config, overrides=args.overrides, **results, verdict=conclusion)
        print(f"appended to {where}")
    return 0


def _git(*command: str) -> None:
    subprocess.run(["git", "-C", str(ROOT), *command], check=True, capture_output=True)


if __name__ == "__main__":
    sys.exit(main())
