"""The benchmarks in bench/, at small sizes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "methods"))
import method_cases as cases

from fastssl import dist

ROOT = Path(__file__).parents[1]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")


def test_a_difference_counts_only_if_the_blocks_do_not_overlap(bench):
    from compare import verdict

    assert "B is faster" in verdict([10, 11, 12, 11], [12.1, 13, 14, 13])
    assert "A is faster" in verdict([12.1, 13, 14, 13], [10, 11, 12, 11])
    assert "no difference" in verdict([10, 11, 12, 11], [11.9, 13, 14, 13])  # one block overlaps
    assert "no verdict" in verdict([1, 1, 1], [2, 2, 2])
    assert "2.9 %" in verdict([1, 1, 1, 1], [2, 2, 2, 2])  # 2 / C(8, 4)


def test_sides_of_a_comparison(bench):
    from compare import side

    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    if not head:
        pytest.skip("not a git checkout")
    both = side("HEAD:speed.graph=on,optim.paramwise.x=a:b")
    assert (both.commit, both.settings) == (head, ("speed.graph=on", "optim.paramwise.x=a:b"))
    assert (side(".").commit, side("speed.graph=on").commit, side("HEAD").settings) == (None, None, ())
    with pytest.raises(ValueError, match="'nowhere' is neither a commit of this repository nor a list of settings"):
        side("nowhere")


def test_packages_are_those_of_the_checkout(bench, tmp_path):
    """Kernels and configs included, which an editable installation maps to the checkout that is installed."""
    from compare import packages

    tree = tmp_path / "tree"
    for name in ("fastssl", "kernels", "data_prep", "configs"):
        (tree / name).mkdir(parents=True)
        (tree / name / "__init__.py").write_text("")
    code = "import fastssl, fastssl.kernels, fastssl.configs; print(fastssl.kernels.__path__[0])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(packages(tree, tmp_path / "site"))},
    )
    assert Path(done.stdout.strip()).resolve() == tree / "kernels", done.stderr


@pytest.fixture
def peers(bench, monkeypatch):
    """bench/peers.py on a few images in memory, without a process group to start and stop."""
    import peers

    dist.init()
    threads = torch.get_num_threads()
    monkeypatch.setattr(dist, "shutdown", lambda: None)
    yield peers
    torch.set_num_threads(threads)


SMALL = "--batch 4 --blocks 1 --steps 1 --input-steps 1 --warm 1 --workers 0 --dry"
TINY = ["memory.beton", "data.views.all.size=16", *SMALL.split()]


def test_peers_have_the_same_losses(peers, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "kornia", None)  # not installed
    done, (out, err) = (
        peers.main([*TINY, "--peers", "kornia", "torchvision"], cases.Memory("memory", 4)),
        capsys.readouterr(),
    )
    assert done == 0, err
    assert "kornia is left out" in out
    rows = {
        line.split()[0]: line.split()[1:] for line in out.splitlines() if line.startswith(("ours  ", "torchvision  "))
    }
    ours, theirs = ([float(x.rstrip(",")) for x in rows[name][-peers.CHECKED :]] for name in ("ours", "torchvision"))
    assert theirs[0] == pytest.approx(ours[0], rel=1e-4)
    assert len(set(ours)) == peers.CHECKED  # it trains
    assert "ours / torchvision: whole step" in out


def test_peers_with_other_losses_raise(bench):
    from types import SimpleNamespace

    from peers import check

    def side(name, *losses):
        losses = iter(losses)
        return SimpleNamespace(
            name=name,
            t=SimpleNamespace(device="cpu"),
            make=lambda raw: [torch.ones(1)],
            train=lambda raw, meter, views: next(losses),
        )

    source = iter(range(9))
    made = check([side("ours", 2.0, 1.9, 1.8), side("x", 2.0001, 1.91, 1.81)], source, "fp32")
    assert made["x"] == [2.0001, 1.91, 1.81]
    with pytest.raises(
        ValueError, match="x has losses of .*, ours are .* so nothing is timed"
    ):  # the first loss sees equal weights and views
        check([side("ours", 2.0, 1.9, 1.8), side("x", 2.001, 1.9, 1.8)], source, "fp32")


def test_a_profile_becomes_a_picture(bench, tmp_path, capsys):
    import picture

    profile = ROOT / "bench/results/profiles/nvidia-h200_simclr_r18_graph_off.txt"
    wall, kinds = picture.read(profile)
    assert wall == 19.03
    assert kinds["waits for the host"] == pytest.approx(19.03 - 6.74)
    assert sum(kinds.values()) == pytest.approx(wall)  # no kernel counted twice, as an op and by itself
    assert kinds["optimizer"] == pytest.approx((0.851998 + 0.402844 + 0.387711) / picture.STEPS)
    made = [tmp_path / f"{i}.svg" for i in range(2)]
    for out in made:
        assert picture.main([str(out), f"a = b={profile}", "--table"]) == 0
    assert made[0].read_bytes() == made[1].read_bytes() and "| the step | 19.03 |" in capsys.readouterr().out
    assert picture.main([str(made[0]), f"x={__file__}"]) == 2
    assert "is not TITLE=FILE with a step.txt" in capsys.readouterr().err


def test_banks_compares_equal_results(bench, monkeypatch, capsys):
    """Each benchmark checks that its algorithms agree before it times them."""
    import banks

    monkeypatch.setattr(banks, "CLUSTERS", 20)
    monkeypatch.setattr(banks, "append", None)
    argv = ["banks.py", "--rows", "6000", "--negatives", "16", "--repeats", "1", "--device", "cpu", "--dry"]
    monkeypatch.setattr(sys, "argv", argv)
    banks.main()
    out = capsys.readouterr().out
    for row in ("ours, from scratch", "ours, shared negatives"):
        assert row in out


def test_the_cost_of_a_checkpoint(bench, monkeypatch, tmp_path, capsys):
    import checkpoint
    import step as bench_step

    run = cases.run("moco", batch=8)
    run.log.root, run.log.keep = str(tmp_path / "runs"), 1
    monkeypatch.setattr(checkpoint.config, "load", lambda *_: run)
    monkeypatch.setattr(bench_step, "build", lambda run: cases.build(run))
    monkeypatch.setattr(bench_step, "describe", lambda t: {})
    monkeypatch.setattr(dist, "shutdown", lambda: None)
    results: dict = {}
    monkeypatch.setattr(checkpoint, "append", lambda name, env, **found: results.update(found))
    monkeypatch.setattr(sys, "argv", ["checkpoint.py", "x.py", "--steps", "2", "--blocks", "3"])
    run.optim.steps = 100
    assert checkpoint.main() == 0
    assert not list((tmp_path / "runs").iterdir())  # nothing is left
    assert results["with_s"]["n"] == 3 and 0 < results["save_s"]["median"] <= results["written_s"]["median"]
    assert results["mb"] > 0.1 and results["interval_s"] == pytest.approx(50 * results["extra_s"], abs=0.1)
    said = capsys.readouterr().out
    assert "training waits 0." in said and "under 2 % if checkpoints are" in said


def test_the_model_of_communication(bench):
    from scaling import communication_ms, model

    sent = {"all_reduce": {"calls": 2, "bytes": 8e9}, "all_gather_into_tensor": {"calls": 1, "bytes": 1e9}}
    assert communication_ms(sent, 1, 5.0, 10.0) == 0
    # 2 * 3/4 * 8 GB and 3 * 1 GB at 10 GB/s, and 2 * 2 * 3 + 3 hops of 5 us
    assert communication_ms(sent, 4, 5.0, 10.0) == pytest.approx(1500 + 0.075)
    found = [
        {"kind": "weak", "ranks": 1, "ms": 500.0, "collectives": {}},
        {"kind": "weak", "ranks": 4, "ms": 900.0, "collectives": sent},
    ]
    rows = model(found, 5.0, 10.0)
    assert [r["ranks"] for r in rows] == [2**i for i in range(10)]
    assert rows[2]["ms"] == pytest.approx(2000.075) and rows[2]["efficiency"] == pytest.approx(500 / 2000.075)


def test_collectives_are_recorded(bench, monkeypatch):
    import torch.distributed as td
    from scaling import per_step, recorded

    dist.init()
    real = td.all_reduce
    with recorded(torch.device("cpu")) as found:
        td.all_reduce(torch.ones(6))
        td.all_gather_into_tensor(torch.empty(4), torch.ones(4))
    assert td.all_reduce is real and all(ms > 0 for *_, ms in found)
    assert per_step(found, 1) == {
        "all_reduce": {"calls": 1, "bytes": 24},
        "all_gather_into_tensor": {"calls": 1, "bytes": 16},
    }


def test_losses_of_two_settings_are_compared(bench, monkeypatch, capsys):
    """With itself, with a slightly different momentum, and with another temperature."""
    import losses

    from fastssl import config, engine

    def load(file, overrides):
        run = cases.run("simclr", norm=False, batch=8)
        for override in overrides:
            config.set_override(run, override)
        return run

    recorded = []
    monkeypatch.setattr(losses, "WINDOW", 4)
    monkeypatch.setattr(losses.config, "load", load)
    monkeypatch.setattr(engine, "build", lambda run, hooks: cases.build(run))
    monkeypatch.setattr(losses.bench_step, "describe", lambda t: {})
    monkeypatch.setattr(dist, "shutdown", lambda: None)
    monkeypatch.setattr(losses, "append", lambda name, env, **found: recorded.append(found))
    for b, verdict in (
        ("optim.lr=0.05", "bits"),
        ("optim.momentum=0.90001", "rounding"),
        ("method.temperature=2.0", "different"),
    ):
        argv = ["losses.py", "x.py", "optim.lr=0.05", b, "log.probe=False", "--steps", "12"]
        monkeypatch.setattr(sys, "argv", argv)
        assert losses.main() == (verdict == "different"), capsys.readouterr().out
        assert recorded[-1]["verdict"] == verdict
        assert (recorded[-1]["a"], recorded[-1]["b"]) == (["optim.lr=0.05"], [b]) and recorded[-1]["ms_a_step"]["a"] > 0
    assert recorded[1]["first"] == 0 and recorded[1]["apart"]["loss"] > 0
    nan = float("nan")
    assert (
        losses.verdict({"loss": [1.0] * 8}, {"loss": [1.0, *[nan] * 7]}, {"loss": [2.0] * 8})["verdict"] == "different"
    )
    monkeypatch.setattr(sys, "argv", ["losses.py", "x.py", "a=1", "b=1", "--steps", "5"])
    assert losses.main() == 2 and "at least 8, two windows of 4" in capsys.readouterr().err


def test_a_run_is_recorded_and_continued(bench, monkeypatch, tmp_path, capsys):
    """The command is replaced by one that writes the log of a run; the second is stopped by SIGTERM."""
    import json

    import run as bench_run

    def step(n, **more):
        times = {
            "total_ms": 6.0 + n,
            "step_ms": 6.0,
            "data_ms": 0.0,
            "other_ms": n,
            "images_per_s": 100,
            "memory_gib": 1,
        }
        return {"step": n, "epoch": 0, "loss": 5.0 - n, **times, **more}

    folder = tmp_path / "named"
    folder.mkdir()
    lines = [step(1), step(2), {"step": 2, "epoch": 0, "knn_top1": 71.234}]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recorded: list[dict] = []
    monkeypatch.setattr(bench_run, "append", lambda name, env, **found: recorded.append(found))
    argv = ["run.py", "configs/quickstart.py", "name=named", f"log.root={tmp_path}"]
    monkeypatch.chdir(ROOT)
    for code, script in ((0, ""), (75, "import os, signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); ")):
        end = "os.kill(os.getppid(), 15); time.sleep(60)" if code else "pass"
        child = [sys.executable, "-c", script + end]
        monkeypatch.setattr(bench_run, "start", lambda command, child=child: subprocess.Popen(child))
        monkeypatch.setattr(sys, "argv", argv)
        before = bench_run.signal.getsignal(bench_run.signal.SIGTERM)
        try:
            assert bench_run.main() == code
        finally:
            bench_run.signal.signal(bench_run.signal.SIGTERM, before)
        found = recorded[-1]
        assert found["finished"] is (code == 0) and found["steps"] == 2 and found["seconds"] == 0.0
        assert found["command"].endswith("--continue") and found["knn_top1"] == {"1": 71.23}
        assert found["longest_ms"] == {"2": 8, "1": 7} and found["ms"]["total"] == 7.5
    assert "appended to" in capsys.readouterr().out
