"""Only complete checkpoints are used."""

import json

import pytest

from fastssl.checkpoint import store


def write(run, step, keep=3):
    folder = store.create(run, step)
    (folder / "more").mkdir()
    (folder / "more" / "states.pt").write_bytes(b"x" * 1000 + str(step).encode())
    (folder / "state.pt").write_bytes(b"y" * 10)
    return store.commit(folder, keep)


def test_the_newest_are_kept_and_found(tmp_path):
    for step in (5, 10, 20, 100):
        write(tmp_path, step)
    assert sorted(p.name for p in store.directory(tmp_path).iterdir()) == [
        "step_00000010",
        "step_00000020",
        "step_00000100",
    ]
    assert store.newest(tmp_path).name == "step_00000100"
    assert store.newest(tmp_path / "elsewhere") is None


def test_an_interrupted_write_is_not_a_checkpoint(tmp_path):
    write(tmp_path, 1)
    half = store.create(tmp_path, 2)
    (half / "state.pt").write_bytes(b"half")
    assert store.newest(tmp_path).name == "step_00000001"
    write(tmp_path, 2)  # the leftovers do not get in the way
    assert store.newest(tmp_path).name == "step_00000002"


@pytest.mark.parametrize(
    "change, problem",
    [
        (lambda p: (p / "state.pt").write_bytes(b"z" * 10), "state.pt has changed"),
        (lambda p: (p / "state.pt").write_bytes(b"y" * 9), "state.pt has 9 bytes, not 10"),
        (lambda p: (p / "more" / "states.pt").unlink(), "states.pt is missing"),
        (lambda p: (p / store.MANIFEST).write_text('{"format": 1, "fi'), "manifest.json is missing or unreadable"),
    ],
)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(tmp_path, change, problem, capsys):
    write(tmp_path, 1)
    path = write(tmp_path, 2)
    assert json.loads((path / store.MANIFEST).read_text())["files"].keys() == {"state.pt", "more/states.pt"}
    change(path)
    assert store.newest(tmp_path).name == "step_00000001"
    (line,) = capsys.readouterr().out.splitlines()
    assert str(path) in line and problem in line
