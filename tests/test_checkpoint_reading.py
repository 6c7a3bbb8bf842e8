"""A checkpoint folder that someone else made: nothing in it runs, and what is refused is one line."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

sys.path.insert(0, str(Path(__file__).parent / "methods"))
import method_cases as cases

from fastssl import train
from fastssl.checkpoint import disk
from fastssl.files import untrusted


class Bomb:
    """Makes the folder `bombed` of the working directory when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("bombed",)


def seal(path):
    """The manifest that a folder of this content has: whoever makes the folder writes it too."""
    temporary = path.with_name(path.name + ".tmp")
    path.rename(temporary)
    (temporary / disk.MANIFEST).unlink()
    return disk.commit(temporary, 9)


def make_run(zero, root):
    run = cases.run("moco", batch=16, steps=4, zero=zero)
    run.name, run.log.root, run.log.checkpoint_steps, run.log.every = f"zero{zero}", str(root), 2, 1
    run.log.keep, run.log.probe = 3, False
    return run


def fit(run, **options):
    from fastssl import dist, engine

    dist.init("cpu")
    return engine.fit(run, device="cpu", loader=cases.loader(run), **options)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of each ZeRO stage, stopped at step 2 of 4, and the losses of all four steps."""
    from fastssl import dist

    root, losses = tmp_path_factory.mktemp("saved"), {}
    for zero in range(4):
        t = fit(make_run(zero, root))
        losses[zero] = log(t.folder)
        shutil.rmtree(t.folder / "checkpoints" / "step_00000004")
    yield root, losses
    dist.shutdown()


def log(folder):
    return [r["loss"] for r in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if "loss" in r]


@pytest.fixture
def folder(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved[0], tmp_path / "runs")
    return tmp_path / "runs"


@pytest.mark.parametrize("zero", range(4))
def test_every_stage_resumes_to_the_same_bits(saved, folder, zero):
    t = fit(make_run(zero, folder), resume=True)
    assert log(t.folder) == saved[1][zero]


def test_nothing_but_state_pt_is_a_pickle(folder):
    for path in folder.glob("*/checkpoints/step_00000002/*"):
        assert path.name in ("state.pt", "manifest.json") or path.suffix == ".safetensors", path


@pytest.mark.parametrize("zero, name", [(0, "state.pt"), (3, "state.pt")])
@pytest.mark.parametrize("how", ["zip", "plain"])
def test_a_pickle_that_would_run_code_is_refused(folder, monkeypatch, zero, name, how):
    path = folder / f"zero{zero}" / "checkpoints" / "step_00000002"
    with (path / name).open("wb") as f:
        torch.save({"module": Bomb()}, f) if how == "zip" else pickle.dump({"module": Bomb()}, f, protocol=2)
    seal(path)
    with pytest.raises(ValueError, match="is refused.*mkdir") as refusal:
        fit(make_run(zero, folder), resume=True)
    assert Path(name).name in str(refusal.value) and "\n" not in str(refusal.value)
    assert not Path("bombed").exists()


@pytest.mark.parametrize(
    "name, content",
    [
        ("state.pt", {"step": 2}),
        ("state.pt", [1]),
        ("weights.safetensors", {}),
        ("weights.safetensors", {"queue": torch.zeros(1)}),
        ("weights.safetensors", b"short"),
        ("rank_0.safetensors", {}),
        ("rank_0.safetensors", {"random/0/0@0": torch.zeros(3)}),
        ("rank_0.safetensors", {"optimizer/momentum_buffer/nothing@0": torch.zeros(3)}),
        ("rank_0.safetensors", {"optimizer/momentum_buffer/projector.2.bias@0": torch.zeros(3)}),
        ("rank_0.safetensors", {"optimizer/momentum_buffer/projector.2.bias@1": torch.zeros(11)}),
        ("rank_0.safetensors", {"name": torch.zeros(3)}),
        ("rank_0.safetensors", None),
    ],
)
@pytest.mark.parametrize("zero", [0, 1])
def test_wrong_contents_of_state_pt_give_a_one_line_error(folder, zero, name, content):
    """`content`: all of the file, tensors in the place of those in it (none at all: {}), or None: no file."""
    path = folder / f"zero{zero}" / "checkpoints" / "step_00000002"
    if name == "state.pt":
        torch.save(content, path / name)
    elif content is None:
        (path / name).unlink()
    elif isinstance(content, bytes):
        (path / name).write_bytes(content)
    else:
        kept = safetensors.torch.load_file(path / name) if content else {}
        new = {key.partition("@")[0] for key in content}
        kept = {key: value for key, value in kept.items() if key.partition("@")[0] not in new}
        safetensors.torch.save_file({**kept, **content}, path / name)
    seal(path)
    with pytest.raises(ValueError, match="step_00000002") as refusal:
        fit(make_run(zero, folder), resume=True)
    assert "\n" not in str(refusal.value)


def test_a_checkpoint_of_an_older_version_is_refused(folder):
    path = folder / "zero0" / "checkpoints" / "step_00000002"
    (path / "deepspeed").mkdir()
    with pytest.raises(ValueError, match="step_00000002 was written by fastssl 0.1.0.*backbone.pretrained"):
        fit(make_run(0, folder), resume=True)


def test_the_command_ends_with_one_line_and_code_2(folder, capsys, monkeypatch):
    from fastssl import build, config

    path = folder / "zero0" / "checkpoints" / "step_00000002"
    torch.save(Bomb(), path / "state.pt")
    seal(path)
    monkeypatch.setattr(config, "check", lambda *_: None)
    monkeypatch.setattr(config, "load", lambda *_: make_run(0, folder))
    monkeypatch.setattr(build, "open_loader", lambda run, device: cases.loader(run))
    assert train.main(["a.py", "--resume", "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert "state.pt is refused" in err and err.count("\n") == 1 and not Path("bombed").exists()


def _quantised():
    return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


def _wide():
    return torch.zeros(1).expand(1 << 20)


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(3).to_sparse(),
        torch.ones(3, device="meta"),
        _quantised,
        _wide,
        lambda: {"a": [{"b": (print,)}]},
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    ],
    ids=["sparse", "meta", "quantised", "expanded", "function", "nested"],
)
@pytest.mark.filterwarnings(
    "ignore:(Sparse invariant checks|TypedStorage|The PyTorch API of nested tensors):UserWarning"
)
def test_other_tensors_and_objects_are_refused(tmp_path, value):
    torch.save(value() if callable(value) else value, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="a.pt"):
        untrusted.read_pt(tmp_path / "a.pt")


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    for path, what in [("pipe.pt", "a pipe"), (".", "a folder"), ("none.pt", "No such"), ("/dev/zero", "a device")]:
        with pytest.raises(ValueError, match=what):
            untrusted.read_pt(tmp_path / path)


def test_a_compressed_file_is_not_inflated(tmp_path):
    """torch.load inflates what a zip holds: 10 GiB of zeros from 10 MB."""
    torch.save({"a": torch.zeros(1 << 18)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as good, zipfile.ZipFile(tmp_path / "b.pt", "w") as bad:
        for item in good.infolist():
            method = zipfile.ZIP_DEFLATED if item.filename.endswith("data/0") else zipfile.ZIP_STORED
            bad.writestr(item.filename, good.read(item), compress_type=method)
    with pytest.raises(ValueError, match=r"b\.pt is refused: .*data/0' in it is compressed, to unpack to 1048576 "):
        untrusted.read_pt(tmp_path / "b.pt")
    assert untrusted.read_pt(tmp_path / "a.pt")["a"].shape == (1 << 18,)


READ = """
import sys
from fastssl.files import untrusted
for path in sys.argv[1:]:
    try:
        untrusted.read_pt(path)
    except ValueError as error:
        print(error)
"""


def test_a_deeply_nested_key_does_not_end_the_process(tmp_path):
    """In a process of its own, since the hash of such a tuple recurses in C."""
    nested = {"one": b"\x85" * 2_000_000, "any": b"q\x00(h\x00t" * 2_000_000}  # (x,); x into the memo, MARK, x, TUPLE
    torch.save({}, tmp_path / "good.pt")
    paths = []
    for name, code in nested.items():
        data = b"\x80\x02}K\x01" + code + b"K\x01s."
        paths += [tmp_path / f"{name}_plain.pt", tmp_path / f"{name}_zip.pt"]
        head = b"".join(pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001}))
        paths[-2].write_bytes(head + data + pickle.dumps([], 2))
        with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(paths[-1], "w") as bad:
            for item in good.infolist():
                bad.writestr(item.filename, data if item.filename.endswith("data.pkl") else good.read(item))
    done = subprocess.run([sys.executable, "-c", READ, *map(str, paths)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr[-500:])
    refusal = "is refused: it has more than 100 tuples inside each other"
    assert done.stdout.splitlines() == [f"{path} {refusal}" for path in paths]
