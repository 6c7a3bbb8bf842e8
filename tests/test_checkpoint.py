"""Only complete checkpoints are used."""

import errno
import itertools
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bare_trainer import bare_trainer
from safetensors.torch import save_file

from fastssl import engine, nonfinite
from fastssl.checkpoint import disk, pieces, run_folder
from fastssl.checkpoint.resume import find_checkpoint
from fastssl.config import Log, Run
from fastssl.report.run_data import RunData, has_checkpoint


def write(run, step, keep=3, keep_interval=0):
    folder = disk.create(run, step)
    (folder / "more").mkdir()
    (folder / "more" / "states.pt").write_bytes(b"x" * 1000 + str(step).encode())
    (folder / "state.pt").write_bytes(b"y" * 10)
    (folder / "empty").write_bytes(b"")
    return disk.commit(folder, keep, keep_interval)


def test_the_newest_checkpoints_are_kept_and_found(tmp_path):
    for step in (5, 10, 20, 100):
        write(tmp_path, step)
    assert sorted(p.name for p in disk.directory(tmp_path).iterdir()) == [
        "step_00000010",
        "step_00000020",
        "step_00000100",
    ]
    assert disk.newest(tmp_path).name == "step_00000100"
    assert disk.newest(tmp_path / "elsewhere") is None


def test_steps_above_8_digits_are_compared_as_numbers(tmp_path):
    first, second, copy = (disk.directory(tmp_path / "r") / name for name in ("step_99999999", "step_100000001", "z"))
    for step in (99999999, 100000001):
        write(tmp_path / "r", step, keep=2)
    assert disk.list_checkpoints(tmp_path / "r") == [second, first]
    assert disk.is_at_or_before(first, second) and not disk.is_at_or_before(second, first)
    assert nonfinite.checkpoint_before(tmp_path / "r", 100000000) == first
    shutil.copytree(first, copy)
    run = Run(method=None, name="r", log=Log(root=str(tmp_path)))
    for path in (first, copy):  # the second would stay, and the next resume would continue from it
        with pytest.raises(ValueError, match=f"holds step_100000001, which does not lead to {path}"):
            find_checkpoint(run, False, path)


def test_an_interrupted_write_is_not_a_checkpoint(tmp_path):
    write(tmp_path, 1)
    half = disk.create(tmp_path, 2)
    (half / "state.pt").write_bytes(b"half")
    assert disk.newest(tmp_path).name == "step_00000001"
    write(tmp_path, 2)  # the leftovers do not get in the way
    assert disk.newest(tmp_path).name == "step_00000002"


def names(run):
    return sorted(int(p.name.removeprefix("step_")) for p in disk.directory(run).iterdir())


def replace_by_a_device(path):
    (path / "empty").unlink()
    (path / "empty").symlink_to(os.devnull)  # which is empty, too; others can be read without end


def change_a_byte(path):
    (path / "state.pt").write_bytes(b"z" * 10)


@pytest.mark.parametrize("keep, left", [(1, [150]), (2, [100, 150]), (-1, [100, 150])])
def test_a_checkpoint_after_a_resume_replaces_the_damaged_one_of_a_later_step(tmp_path, keep, left):
    """100 is complete, 200 is damaged, and a signal comes at 150."""
    write(tmp_path, 100)
    change_a_byte(write(tmp_path, 200))
    path = write(tmp_path, 150, keep)
    assert names(tmp_path) == left and disk.newest(tmp_path) == path


@pytest.mark.parametrize("change", [change_a_byte, lambda p: (p / "state.pt").unlink()])
def test_damaged_checkpoints_do_not_count_among_those_kept(tmp_path, change):
    for step in (100, 200, 300):
        path = write(tmp_path, step)
    change(path)
    write(tmp_path, 400, keep=2)
    assert names(tmp_path) == [200, 300, 400]
    write(tmp_path, 500, keep=2)
    assert names(tmp_path) == [400, 500]


def test_multiples_of_the_interval_are_kept(tmp_path):
    for step in range(10, 70, 10):
        write(tmp_path, step, keep=2, keep_interval=20)
    assert names(tmp_path) == [20, 40, 50, 60]


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path):
    change_a_byte(write(tmp_path, 1))
    assert disk.damage(write(tmp_path, 1)) is None


def test_files_manifest_and_folder_are_on_the_disk_before_older_ones_are_deleted(tmp_path, monkeypatch):
    done, fsync, rmtree = [], os.fsync, disk.shutil.rmtree
    write(tmp_path, 1)
    monkeypatch.setattr(
        disk.os, "fsync", lambda fd: (done.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name), fsync(fd))
    )
    monkeypatch.setattr(
        disk.shutil, "rmtree", lambda path, **o: (done.append(f"delete {path.name}"), rmtree(path, **o))
    )
    folder = disk.create(tmp_path, 2)
    disk.commit(folder, 1, entries={"state.pt": disk.write(folder / "state.pt", b"y")})
    wanted = ["state.pt", "manifest.json", "checkpoints", "delete step_00000001"]
    assert [step for step in done if step in wanted] == wanted


def test_which_checkpoints_lead_to_another(tmp_path):
    one, two = (tmp_path / "a" / f"step_{i:08d}" for i in (1, 2))
    assert disk.is_at_or_before(one, two) and disk.is_at_or_before(two, two) and not disk.is_at_or_before(two, one)
    assert not disk.is_at_or_before(tmp_path / "b" / one.name, two), "of another run"


@pytest.mark.parametrize("name", ["../outside", "more/../../outside", "/etc/hostname", "a\0b"])
def test_a_manifest_that_names_a_file_outside_is_damage(tmp_path, name):
    path = write(tmp_path, 1)
    manifest = json.loads((path / disk.MANIFEST).read_text())
    manifest["files"][name] = manifest["files"]["state.pt"]
    (path / disk.MANIFEST).write_text(json.dumps(manifest))
    assert disk.damage(path) == "manifest.json is missing or unreadable"


def test_a_checkpoint_of_an_earlier_process_is_read_once(tmp_path, monkeypatch):
    write(tmp_path, 1)
    known, read, sha256 = set(), [], disk.files.sha256
    monkeypatch.setattr(disk.files, "sha256", lambda path: read.append(path.name) or sha256(path))
    for step in (2, 3):
        folder = disk.create(tmp_path, step)
        disk.commit(folder, 9, entries={"state.pt": disk.write(folder / "state.pt", b"y")}, known=known)
    assert sorted(read) == ["empty", "state.pt", "states.pt"]


def test_a_checkpoint_found_complete_is_not_read_again(tmp_path, monkeypatch):
    known, read = set(), []
    monkeypatch.setattr(disk.files, "sha256", lambda path: read.append(path) or "")
    for step in (1, 2, 3):
        folder = disk.create(tmp_path, step)
        entries = {"state.pt": disk.write(folder / "state.pt", b"y" * 10)}
        disk.commit(folder, 2, entries=entries, known=known)
    assert names(tmp_path) == [2, 3] and not read


@pytest.mark.parametrize(
    "change, problem",
    [
        (lambda p: (p / "state.pt").write_bytes(b"z" * 10), "state.pt has changed"),
        (lambda p: (p / "state.pt").write_bytes(b"y" * 9), "state.pt has 9 bytes, not 10"),
        (lambda p: (p / "more" / "states.pt").unlink(), "states.pt is missing"),
        (replace_by_a_device, "empty is missing"),
        (lambda p: (p / disk.MANIFEST).write_text('{"format": 1, "fi'), "manifest.json is missing or unreadable"),
    ],
)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(tmp_path, change, problem, capsys):
    write(tmp_path, 1)
    path = write(tmp_path, 2)
    assert json.loads((path / disk.MANIFEST).read_text())["files"].keys() == {"state.pt", "more/states.pt", "empty"}
    change(path)
    assert disk.newest(tmp_path).name == "step_00000001"
    (line,) = capsys.readouterr().out.splitlines()
    assert str(path) in line and problem in line


def set_format(path, number):
    manifest = json.loads((path / disk.MANIFEST).read_text())
    (path / disk.MANIFEST).write_text(json.dumps(manifest | {"format": number}))


def test_a_checkpoint_of_a_newer_format_is_refused_and_not_passed_over(tmp_path):
    """An older one would be continued from, and the newer one deleted with the next checkpoint."""
    run = Run(method=None, name="r", log=Log(root=str(tmp_path)))
    write(tmp_path / "r", 1)
    path = write(tmp_path / "r", 2)
    set_format(path, 2)
    for arguments in ((True,), ("auto",), (False, path), (False,)):
        with pytest.raises(
            ValueError, match="step_00000002 has format 2, and this version of fastssl reads format 1: use"
        ):
            find_checkpoint(run, *arguments)
    assert path.exists() and find_checkpoint(run, False, force=True) is None
    data = RunData(tmp_path / "r")
    assert not has_checkpoint(data) and "has format 2" in data.notes[0]


@pytest.mark.parametrize("resume", ["step_00000001", Path("step_00000001"), "Auto"])
def test_resume_takes_no_checkpoint(tmp_path, resume):
    """The newest would be continued from, and not the one that is named."""
    run = Run(method=None, name="r", log=Log(root=str(tmp_path)))
    write(tmp_path / "r", 1)
    with pytest.raises(ValueError, match=f"resume='{resume}' must be True, False or 'auto'; resume_from takes"):
        find_checkpoint(run, resume)


def test_a_run_continues_its_own_checkpoint_before_the_one_it_was_to_start_from(tmp_path, monkeypatch):
    """As a run that is started again does, whose first start had --resume-from."""
    run = Run(method=None, name="r", log=Log(root=str(tmp_path)))
    monkeypatch.setattr("fastssl.checkpoint.resume.state.read", lambda path: {})
    monkeypatch.setattr("fastssl.checkpoint.resume.check_compatible", lambda *_: None)
    other = write(tmp_path / "other", 7)
    for arguments in ((True, other), ("auto", other, True)):
        with pytest.raises(ValueError, match="give one of them"):
            find_checkpoint(run, *arguments)
    assert find_checkpoint(run, "auto", other) == other
    own = write(tmp_path / "r", 2)
    assert find_checkpoint(run, "auto", other) == own


def test_a_config_with_the_file_name_of_another_does_not_delete_its_run(tmp_path):
    ours, theirs = (tmp_path / folder / "c.py" for folder in "ab")
    for file in (ours, theirs):
        file.parent.mkdir()
        file.touch()
    run = Run(method=None, name="c", log=Log(root=str(tmp_path)))
    write(tmp_path / "c", 1)
    assert find_checkpoint(run, False, force=True, config_file=ours) is None  # of a version that records no config
    run_folder.record_environment(bare_trainer(run, folder=tmp_path / "c"), theirs)
    with pytest.raises(ValueError, match=f"already holds step_00000001 of {theirs}: give another name=...$"):
        find_checkpoint(run, False, config_file=ours)
    with pytest.raises(
        ValueError, match=f"--force would delete the run of {theirs} in {tmp_path}/c: give another name"
    ):
        find_checkpoint(run, False, force=True, config_file=ours)
    with pytest.raises(ValueError, match="already holds step_00000001: continue it with --resume"):
        find_checkpoint(run, False, config_file=theirs)
    assert find_checkpoint(run, False, force=True, config_file=theirs) is None
    assert find_checkpoint(run, False, force=True, config_file=tmp_path / "d.py") is None  # name=c was given
    theirs.rename(tmp_path / "moved.py")
    assert find_checkpoint(run, False, force=True, config_file=ours) is None


def test_a_checkpoint_of_a_newer_format_counts_among_those_kept(tmp_path):
    set_format(write(tmp_path, 2), 2)
    write(tmp_path, 3)
    write(tmp_path, 4, keep=2)
    assert names(tmp_path) == [3, 4]
    set_format(write(tmp_path, 5), 2)
    write(tmp_path, 6, keep=2)
    assert names(tmp_path) == [5, 6]


@pytest.mark.parametrize("number", [None, 0, "1", 1.0, True, [1]])
def test_a_manifest_without_a_format_is_damage(tmp_path, number):
    path = write(tmp_path, 1)
    set_format(path, number)
    assert disk.damage(path) == "manifest.json is missing or unreadable"


def test_an_unreadable_file_makes_a_checkpoint_damaged(tmp_path, monkeypatch, capsys):
    write(tmp_path, 1)
    path, sha256 = write(tmp_path, 2), disk.files.sha256

    def failing(file):
        if file.parent == path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return sha256(file)

    monkeypatch.setattr(disk.files, "sha256", failing)
    assert disk.newest(tmp_path).name == "step_00000001"
    assert "cannot be read: Input/output error" in capsys.readouterr().out


def test_any_rows_of_a_tensor_in_pieces_are_read(tmp_path):
    whole = torch.arange(10.0).view(5, 2)
    for rank, (start, stop) in enumerate(((0, 0), (0, 3), (3, 5))):
        save_file({pieces.piece("x", start): whole[start:stop].clone()}, tmp_path / str(rank))
    for ranks in ((0, 1, 2), (0, 2, 1)):
        saved = pieces.Pieces(tmp_path / str(rank) for rank in ranks)["x"]
        for start, stop in itertools.combinations_with_replacement(range(6), 2):
            assert torch.equal(saved[start:stop], whole[start:stop])


@pytest.mark.parametrize("start, shape", [(2, (2, 2)), (4, (2, 2)), (3, (2, 3)), (3, ())])
def test_pieces_that_do_not_follow_each_other_are_refused(tmp_path, start, shape):
    save_file({"x@0": torch.zeros(3, 2)}, tmp_path / "0")
    save_file({f"x@{start}": torch.zeros(shape)}, tmp_path / "1")
    with pytest.raises(ValueError, match=f"the pieces of x do not follow each other at {start}"):
        pieces.Pieces([tmp_path / "0", tmp_path / "1"])


@pytest.mark.parametrize("epochs, due", [(0.1, [1, 2, 3, 4]), (0.5, [2, 4]), (1, [4]), (0, [])])
def test_a_checkpoint_is_due_every_so_many_epochs_and_at_least_a_step_apart(epochs, due):
    run, loader = Run(method=None, log=Log(checkpoint_epochs=epochs)), SimpleNamespace(steps=4)
    assert [n for n in range(1, 5) if engine.checkpoint_due(bare_trainer(run, loader, step=n))] == due
