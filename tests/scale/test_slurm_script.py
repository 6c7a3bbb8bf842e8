"""`fastssl slurm`: the sbatch script, its options, and what bash does with it.  test_launchers.py runs it on Slurm."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fastssl import slurm

CONFIG = """
from fastssl import views
from fastssl.config import Data, Optim, Run
from fastssl.methods import simclr

def get_config():
    return Run(method=simclr.Config(), data=Data(train="data.beton", views=views.simclr(32)), optim=Optim(batch=64))
"""
RECORD = """#!{python}
import json, os, sys
with open("{record}", "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
print("7;cluster")
sys.exit({code})
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder whose name needs quotes, with a config whose name does, too."""
    folder = tmp_path / "it's $(touch x) a"
    folder.mkdir()
    (folder / "my c.py").write_text(CONFIG)
    monkeypatch.chdir(folder)
    return folder


def program(folder: Path, name: str, code: int = 0) -> None:
    """A program in `folder`/bin that records its arguments and ends with `code`."""
    file = folder.parent / "bin" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(RECORD.format(python=sys.executable, record=folder.parent / "calls", code=code))
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


def calls(folder: Path) -> list[list[str]]:
    file = folder.parent / "calls"
    lines = file.read_text().splitlines() if file.exists() else []
    file.unlink(missing_ok=True)
    return [json.loads(line) for line in lines]


def options(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH ")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def dry_run(capsys, *args: str, root: str = "/runs") -> str:
    assert slurm.main(["my c.py", *args, f"log.root={root}", "--dry-run"]) == 0
    return capsys.readouterr().out


def test_the_script_has_the_options_of_the_job(folder, capsys):
    wanted = {
        "job-name": '"my c"',
        "nodes": "4",
        "ntasks-per-node": "8",
        "cpus-per-task": "8",
        "gpus-per-node": "8",
        "partition": "gpu",
        "account": "me",
        "time": "12:00:00",
        "output": '"/runs/my c/slurm-%j.out"',
        "open-mode": "append",
        "requeue": "",
        "signal": "USR1@180",
        "qos": "high",
        "exclusive": "",
    }
    place = ["--nodes", "4", "--partition", "gpu", "--account", "me", "--time", "12:00:00"]
    command = [*place, "--sbatch", "qos=high", "--sbatch", "exclusive"]
    assert options(dry_run(capsys, *command)) == wanted
    assert os.listdir(folder) == ["my c.py"], "--dry-run writes nothing"


def test_the_output_is_in_a_run_folder_with_a_percent_sign(folder, capsys):
    """sbatch replaces %x, %j, ... in the path of the output, and %% by %."""
    assert options(dry_run(capsys, "name=a%j"))["output"] == "/runs/a%%j/slurm-%j.out"


def test_gpus_are_requested_once_or_not_at_all(folder, capsys):
    assert options(dry_run(capsys, "--sbatch", "gres=gpu:a100:8")).get("gpus-per-node") is None
    flags = options(dry_run(capsys, "--sbatch", "gres-flags=enforce-binding", "--sbatch", "time-min=10"))
    assert flags["gres-flags"] and flags["time-min"] == "10" and flags["gpus-per-node"] == "8"
    assert options(dry_run(capsys, "--device", "cpu")).get("gpus-per-node") is None
    assert options(dry_run(capsys, "--ranks-per-node", "4"))["gpus-per-node"] == "4"


@pytest.mark.parametrize("code, requeued", [(75, True), (0, False), (2, False), (143, False)])
def test_bash_passes_every_argument_on_and_queues_a_stopped_run_again(folder, capsys, monkeypatch, code, requeued):
    overrides = [
        "name=a b",
        "optim.schedule=step",
        "optim.milestones=(1,2)",
        "data.train=$(touch x)'\"`touch x`;\n#SBATCH --nodes=9",
    ]
    script = dry_run(capsys, *overrides, "--force", "--device", "cpu", root=f"{folder.parent}/my runs")
    assert options(script.split("\n\n")[0])["nodes"] == "1"
    program(folder, "srun", code)
    program(folder, "scontrol")
    variables = {"PATH": f"{folder.parent}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    saved = folder.parent / "my runs/a b/slurm-7.saved"
    saved.parent.mkdir(parents=True)
    # A node that fails before the first checkpoint: the same start, since --force may not have deleted everything yet
    starts = (("", False, "--force"), ("1", False, "--force"), ("2", True, "--continue"), ("", True, "--force"))
    for restart, has_saved, start in starts:
        if has_saved:
            saved.touch()
        env = os.environ | variables | ({"SLURM_RESTART_COUNT": restart} if restart else {})
        done = subprocess.run(["bash"], input=script, text=True, env=env, cwd="/", capture_output=True)
        assert done.returncode == code, done.stderr
        srun, *then = calls(folder)
        given = srun[srun.index("fastssl.train") + 1 :]
        words = ["my c.py", *overrides, start, "--device", "cpu", f"log.root={folder.parent}/my runs"]
        assert sorted(given) == sorted(words) and "--kill-on-bad-exit=0" in srun and sys.executable in srun
        assert srun[srun.index("env") + 1] == f"FASTSSL_SAVED={saved}" and saved.exists() == (start == "--continue")
        assert then == ([["scontrol", "requeue", "7"]] if requeued else [])
    assert os.listdir(folder) == ["my c.py"]


@pytest.mark.parametrize(
    "start",
    [
        ["--resume"],
        ["--force"],
        ["--continue"],
        ["--resume-from", "a/step_1"],
        ["--resume-from=a/step_1", "--force"],
        [],
    ],
)
def test_a_job_that_is_queued_again_after_a_checkpoint_continues_however_it_was_started(folder, capsys, start):
    again = next(line for line in dry_run(capsys, *start).splitlines() if "--continue)" in line)
    source = "".join(f" {word}" for word in start if "a/step_1" in word or word == "--resume-from")
    assert again.strip() == f"arguments=('my c.py'{source} log.root=/runs --continue)"


@pytest.mark.parametrize(
    "args, message",
    [
        (["--nodes", "3"], "optim.batch=64 is not a multiple of the 24 ranks (3 nodes of 8)"),
        (["--nodes", "0"], "--nodes 0: a number from 1 to 65535"),
        (["--grace", "70000"], "--grace 70000: a number from 1 to 65535"),
        (["--time", "3"], "--time 3 is not longer than --grace 180"),
        (["--time", "00:02:59"], "--time 00:02:59 is not longer than --grace 180"),
        (["--time", "1:30"], "--time 1:30 is not longer than --grace 180"),
        (["--sbatch", "nodes=2"], "--sbatch nodes: `fastssl slurm` sets it; use --nodes"),
        (["--sbatch", "tasks-per-node=2"], "`fastssl slurm` sets it; use --ranks-per-node"),
        (["--sbatch", "arr=0-3"], "--sbatch arr: write the whole name of the option, such as array"),
        (["--sbatch", "gre=gpu:8"], "--sbatch gre: write the whole name of the option, such as gres"),
        (["--sbatch", "no-requeue"], "it would break queueing again and resuming"),
        (["optim.lrr=1"], "did you mean 'lr'"),
        (["name=a#b"], "an #SBATCH line cannot hold the character '#'"),
        (['name=a"b'], "an #SBATCH line cannot hold the character '\"'"),
        (["other.py"], "'other.py' is a second config file"),
    ],
)
def test_a_wrong_value_is_a_one_line_error(folder, capsys, args, message):
    assert slurm.main(["my c.py", "--dry-run", *args]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.count("\n") == 1 and not shown.out


@pytest.mark.parametrize(
    "args, message",
    [
        (["--time", "tomorrow"], "'tomorrow': minutes, or such as 12:00:00 or 2-12:00:00"),
        (["--partition", "gpu;reboot"], "'gpu;reboot': letters, digits and . , / @ + - _"),
        (["--account", "a\n#SBATCH --uid=0"], "letters, digits and"),
        (["--sbatch", "qos=a\nb"], "an #SBATCH line cannot hold the character"),
        (["--sbatch", "-p gpu"], "NAME=VALUE with a long option of sbatch"),
        (["--sbatch", "comment='x'"], 'an #SBATCH line cannot hold the character "\'"'),
        (["--tim", "3"], "fastssl slurm: unrecognized arguments: --tim"),
    ],
)
def test_an_unsupported_sbatch_option_is_refused(folder, capsys, args, message):
    with pytest.raises(SystemExit):
        slurm.main(["my c.py", "--dry-run", *args])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, seconds", [("3", 180), ("3:20", 200), ("1:00:01", 3601), ("1-2", 93600), ("0-0:5", 300)]
)
def test_time_limits_are_read_as_by_sbatch(text, seconds):
    assert slurm._seconds(text) == seconds


def test_a_time_limit_of_zero_is_none(folder, capsys):
    assert "#SBATCH --time=0" in dry_run(capsys, "--time", "0").splitlines()


def test_a_job_is_submitted_with_the_script_in_the_run_folder(folder, capsys, monkeypatch):
    program(folder, "sbatch")
    monkeypatch.setenv("PATH", f"{folder.parent}/bin")
    root = folder.parent / "runs"
    arguments = ["my c.py", f"log.root={root}", "--time", "2-0"]
    assert slurm.main(arguments) == 0
    out = capsys.readouterr().out
    assert out == f"job 7 is queued: {root}/my c/slurm.sh; output: {root}/my c/slurm-7.out\n"
    assert calls(folder) == [["sbatch", "--parsable", f"{root}/my c/slurm.sh"]]
    assert slurm.main([*arguments, "--dry-run"]) == 0
    assert (root / "my c/slurm.sh").read_text() == capsys.readouterr().out


def test_a_missing_or_failing_sbatch_is_a_one_line_error(folder, capsys, monkeypatch):
    (folder.parent / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{folder.parent}/bin")
    root = folder.parent / "runs"
    assert slurm.main(["my c.py", f"log.root={root}"]) == 2
    assert "sbatch not found: submit " in capsys.readouterr().err
    program(folder, "sbatch", 1)
    assert slurm.main(["my c.py", f"log.root={root}"]) == 2
    assert capsys.readouterr().err.startswith(f"fastssl slurm: sbatch {root}/my c/slurm.sh: ")
