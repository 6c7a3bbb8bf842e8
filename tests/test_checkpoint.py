"""A checkpoint is complete or it is not used."""

import json

import pytest

from fastssl.checkpoint import folder as checkpoint


def write(run, step, keep=3):
    folder = checkpoint.begin(run, step)
    (folder / "deepspeed").mkdir()
    (folder / "deepspeed" / "states.pt").write_bytes(b"x" * 1000 + str(step).encode())
    (folder / "state.pt").write_bytes(b"y" * 10)
    return checkpoint.commit(folder, keep)


def test_the_newest_are_kept_and_found(tmp_path):
    for step in (5, 10, 20, 100):
        write(tmp_path, step)
    assert sorted(p.name for p in checkpoint.folder(tmp_path).iterdir()) == [
        "step_00000010",
        "step_00000020",
        "step_00000100",
    ]
    assert checkpoint.newest(tmp_path).name == "step_00000100"
    assert checkpoint.newest(tmp_path / "elsewhere") is None


def test_an_interrupted_write_is_not_a_checkpoint(tmp_path):
    write(tmp_path, 1)
    half = checkpoint.begin(tmp_path, 2)
    (half / "state.pt").write_bytes(b"half")
    assert checkpoint.newest(tmp_path).name == "step_00000001"
    write(tmp_path, 2)  # the leftovers do not get in the way
    assert checkpoint.newest(tmp_path).name == "step_00000002"


@pytest.mark.parametrize(
    "hurt, problem",
    [
        (lambda p: (p / "state.pt").write_bytes(b"z" * 10), "state.pt has changed"),
        (lambda p: (p / "state.pt").write_bytes(b"y" * 9), "state.pt has 9 bytes, not 10"),
        (lambda p: (p / "deepspeed" / "states.pt").unlink(), "states.pt is missing"),
        (lambda p: (p / checkpoint.MANIFEST).write_text('{"format": 1, "fi'), "manifest.json is missing or unreadable"),
    ],
)
def test_a_damaged_one_is_named_and_the_one_before_is_used(tmp_path, hurt, problem):
    write(tmp_path, 1)
    path, said = write(tmp_path, 2), []
    assert json.loads((path / checkpoint.MANIFEST).read_text())["files"].keys() == {"state.pt", "deepspeed/states.pt"}
    hurt(path)
    assert checkpoint.newest(tmp_path, said.append).name == "step_00000001"
    assert len(said) == 1 and str(path) in said[0] and problem in said[0]
