"""Damaged bytes, JSON values and text, and what readers do with them, watched by Python's audit events."""

import json
import os
import random
import resource
import sys
import time
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fastssl.files import untrusted

ODD = [None, True, -1, 0, 1, 2**31, 2**63, 2**64, 1e308, "", "x", "\0", "../x", [], {}, [None], {"a": 1}, [[[]]], "nan"]
NUMBERS = [0, 1, 2, 7, 255, 2**16 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1]
CODE = [  # what an ordinary unpickler would call
    b"cos\nmkdir\n(S'bombed'\ntR.",
    b"cbuiltins\nexec\n(S'import os; os.mkdir(\"bombed\")'\ntR.",
    b"csubprocess\nPopen\n((S'true'\nltR.",
]
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
HANG_S = 60  # of one case, on a machine that does other things
MEMORY_KIB = 1 << 20  # a GiB: what a test's cases may add to the memory of the process
# Every target has both numbers of cases; `make test-full` runs the second one, too.
both = pytest.mark.parametrize("cases", [50, pytest.param(1000, marks=pytest.mark.full)])


def damaged(data: bytes, rng: random.Random, head: int | None = None) -> bytes:
    """Up to four changes in the first `head` bytes: bits, numbers, deletions, insertions, code, truncation."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(max(1, min(len(out), head or len(out))))
        how = rng.choice("bbnnhcetp" if head is None else "bbbnnn")
        if how == "b" and out:
            out[at] ^= 1 << rng.randrange(8)
        elif how == "n":
            size = rng.choice([1, 2, 4, 8])
            out[at : at + size] = (rng.choice(NUMBERS) % 256**size).to_bytes(size, "little")[: max(0, len(out) - at)]
        elif how == "h":
            del out[at : at + rng.randint(1, 40)]
        elif how == "c":
            out[at:at] = out[: rng.randint(1, 40)]
        elif how == "t":
            out[at:at] = bytes(rng.randint(1, 40))
        elif how == "p":
            code = rng.choice(CODE)
            out[at : at + len(code)] = code
        else:
            del out[at:]
    return bytes(out)


def odd(value, rng: random.Random):
    """A copy of a JSON value with one part replaced or left out."""
    value = json.loads(json.dumps(value))
    if not isinstance(value, dict | list) or not value or rng.random() < 0.03:
        return rng.choice(ODD)
    key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    if isinstance(value[key], dict | list) and value[key] and rng.random() < 0.8:
        value[key] = odd(value[key], rng)
    elif isinstance(value, dict) and rng.random() < 0.2:
        del value[key]
    else:
        value[key] = rng.choice(ODD)
    return value


def odd_json(value, rng: random.Random) -> bytes:
    if rng.random() < 0.6:
        return json.dumps(odd(value, rng)).encode()
    if rng.random() < 0.1:
        return b'{"a":' * 100_000 if rng.random() < 0.5 else b"[" * 100_000
    return damaged(json.dumps(value).encode(), rng)


def mixed(lines: list[bytes], rng: random.Random) -> bytes:
    """A text of some of the lines, in half of the cases damaged."""
    text = b"\n".join(rng.choice(lines) for _ in range(rng.randint(0, 4))) * rng.choice([1, 2])
    return damaged(text, rng) if text and rng.random() < 0.5 else text


class Watch:
    """Records, while `folder` is set, what runs code from elsewhere or changes files outside the folder."""

    CODE = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "pickle.find_class")
    CODE += ("socket.connect", "socket.bind", "marshal.loads")
    PATHS = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.link", "os.chmod", "os.truncate")

    def __init__(self):
        self.folder: Path | None = None
        self.seen: list[str] = []
        sys.addaudithook(self.hook)  # stays for the life of the process

    def hook(self, event: str, args: tuple) -> None:
        if self.folder is None:
            return
        if event in self.CODE and not self.is_library():
            self.seen.append(f"{event} {args[:2]!r:.200}")
        elif event in self.PATHS and self.is_outside(args[0]):
            self.seen.append(f"{event} {args[0]!r:.200}")
        elif event == "open" and isinstance(args[2], int) and args[2] & WRITING and self.is_outside(args[0]):
            self.seen.append(f"open for writing {args[0]!r:.200}")

    def is_outside(self, path) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False  # an open file
        path = os.path.abspath(os.fsdecode(path))
        return not path.startswith(str(self.folder)) and "__pycache__" not in path and not path.startswith("/dev/")

    def is_library(self) -> bool:
        """Whether an import reads a .pyc, or numba its own functions."""
        frame = sys._getframe(2)
        while frame is not None:
            if "importlib" in frame.f_code.co_filename or "/numba/" in frame.f_code.co_filename:
                return True
            frame = frame.f_back
        return False


WATCH = Watch()


def files_below(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def is_refused(read, case, folder: Path, longest: int = 1000) -> bool:
    """Whether `read(case)` raises, which must be a ValueError of one line that leaves no file in `folder` behind.  No
    code from the data is run and no file outside the folder changes."""
    present, start, refused = files_below(folder), time.monotonic(), False
    WATCH.folder, WATCH.seen = folder, []
    try:
        read(case)
    except ValueError as error:
        refused = True
        known = type(error) in (ValueError, untrusted.CodeRefused) or "fastssl" in type(error).__module__
        assert known, repr(error)
        line, *proposed = str(error).split("\n")
        assert len(line) < longest and all(text.startswith("  python -c") for text in proposed), str(error)
        left = {path: size for path, size in files_below(folder).items() if not path.endswith(".bad.txt")}
        assert left == present, "a refused file left others behind or changed"
    finally:
        WATCH.folder = None
    assert not WATCH.seen, WATCH.seen
    assert time.monotonic() - start < HANG_S
    return refused


def fuzz(make, read, cases: int, folder: Path, refused_at_least: int | None = None, longest: int = 1000) -> None:
    """`read(make(rng, case))` for as many cases, whose files are in `folder`, each as in `is_refused`; some cases
    fail."""
    count, refused = 0, 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def one(rng, _):  # the number makes every case another one for hypothesis, also where `make` draws nothing
        nonlocal count, refused
        count += 1
        refused += is_refused(read, make(rng, count - 1), folder, longest)

    limits = settings(
        max_examples=cases,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limits(given(st.randoms(use_true_random=False), st.integers())(one))()
    assert count >= cases, count
    assert refused >= (1 + cases // 20 if refused_at_least is None else refused_at_least), "too few were refused"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY_KIB
