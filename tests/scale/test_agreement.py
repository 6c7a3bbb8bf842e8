"""Ranks that differ in settings, code, versions, data or folder are an error at the start, which names the rank."""

import os
import socket
import sys
from importlib import metadata
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
import ranks

from fastssl import agreement, config, dist, engine, views
from fastssl.methods import simclr

HOST = socket.gethostname()
HOOK = """
from dataclasses import dataclass
from fastssl.hooks import Hook

@dataclass
class Look(Hook):
    def after_step(self, t, out, batch):
        print({each})
"""


def make_run(hook: str = "1", lr: float = 0.1, name: str = "r") -> config.Run:
    spec = spec_from_file_location("user_hooks", Path(f"{hook}/hooks.py").resolve())
    sys.modules["user_hooks"] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules["user_hooks"])
    return config.Run(
        method=simclr.Config(),
        data=config.Data(train="data.beton", views=views.simclr(32)),
        hooks=(sys.modules["user_hooks"].Look(),),
        optim=config.Optim(lr=lr, batch=8),
        name=name,
    )


def worker(out: str) -> None:
    said = {}

    def case(name: str, function, *args) -> None:
        try:
            said[name] = function(*args)
        except ValueError as error:
            said[name] = str(error)

    dist.init("cpu")
    rank, folder = dist.rank(), Path(out).parent
    os.chdir(folder)
    case("equal", agreement.compare, make_run())
    case("settings", agreement.compare, make_run(lr=0.1 + rank, name=f"r{rank}"))
    case("training", engine.fit, make_run(lr=0.1 + rank))
    case("hook", agreement.compare, make_run(hook=str(1 + rank)))
    with pytest.MonkeyPatch.context() as patch:
        version, code = metadata.version, agreement._code
        patch.setattr(metadata, "version", lambda name: "0.1" if rank and name == "deepspeed" else version(name))
        case("version", agreement.compare, make_run())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement, "_code", lambda run: code(run) | ({"fastssl/step.py": "0"} if rank else {}))
        case("code", agreement.compare, make_run())
    with pytest.MonkeyPatch.context() as patch:
        if rank:
            patch.chdir("other")  # where the data has another size and rank 0's run folder is not seen
        hook = f"{'../' if rank else ''}1"
        case("data", agreement.compare, make_run(hook=hook))
        patch.setattr(agreement, "SHARED_S", 1.0)
        case("folder", agreement.check_folder, Path("run"), "lock")
    case("one folder", agreement.check_folder, Path("run"), "lock")
    if rank == 0:
        torch.save(said, out)
    dist.barrier()
    dist.shutdown()


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    folder = tmp_path_factory.mktemp("agreement")
    for name in ("1", "2", "run", "other"):
        (folder / name).mkdir()
    for each in ("1", "2"):
        (folder / each / "hooks.py").write_text(HOOK.format(each=each))
    (folder / "data.beton").write_bytes(b"12345")
    (folder / "other/data.beton").write_bytes(b"123")
    (folder / "run/lock").write_text("process 1 on node1")
    return ranks.launch(__file__, 2, folder / "said.pt")


def test_equal_ranks_start(said):
    assert said["equal"] is None and said["one folder"] is None


@pytest.mark.parametrize(
    "case, difference",
    [
        ("settings", "optim.lr is 1.1 there and 0.1 on rank 0; name is r1 there and r0 on rank 0"),
        ("training", "optim.lr is 1.1 there and 0.1 on rank 0"),
        ("version", "deepspeed is 0.1 there and "),
        ("code", "fastssl/step.py is 0 there and "),
        ("hook", "hooks.py is "),
        ("data", "size of data.beton is 3 there and 5 on rank 0"),
    ],
)
def test_ranks_that_differ_are_named_with_the_difference(said, case, difference):
    assert said[case].startswith(f"rank 1 on {HOST} differs from rank 0 on {HOST}: {difference}"), said[case]
    assert said[case].endswith("on rank 0. Start all ranks with the same command, code and data")


def test_a_run_folder_that_is_not_shared_is_an_error(said):
    expected = f"rank 1 on {HOST} does not see the run folder run of rank 0 on {HOST}: start all ranks in one folder"
    assert said["folder"].startswith(expected)


if __name__ == "__main__":
    ranks.main(worker)
