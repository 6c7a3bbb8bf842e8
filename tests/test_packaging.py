"""The wheel contains every module and can be imported beside PyPI's `kernels`; tools/setup.sh names what is missing."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import fastssl

ROOT = Path(__file__).parents[1]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
INSTALLED = ("fastssl", "kernels", "data_prep", "configs")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """A wheel built from a copy, because setuptools leaves build folders behind."""
    source = tmp_path_factory.mktemp("source")
    for folder in INSTALLED:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation", "-w", "out", "."]
    subprocess.run(command, cwd=source, check=True)
    return zipfile.ZipFile(next((source / "out").glob("*.whl")))


def test_wheel_contains_every_module(wheel):
    expected = set()
    for folder in INSTALLED:
        prefix = "" if folder == "fastssl" else "fastssl/"
        expected |= {prefix + f.relative_to(ROOT).as_posix() for f in (ROOT / folder).rglob("*.py")}
    assert expected == {name for name in wheel.namelist() if name.endswith(".py")}
    assert any(name.endswith("LICENSE") for name in wheel.namelist())
    recipes = {f"fastssl/{f.relative_to(ROOT).as_posix()}" for f in (ROOT / "configs/detection").iterdir()}
    assert recipes and recipes <= set(wheel.namelist())


def run_python(code: str, cwd: Path, *path: Path) -> str:
    """Run in a folder with other packages called `kernels` and `data_prep`, as if PyPI's `kernels` were installed."""
    for name in ("kernels", "data_prep"):
        (cwd / name).mkdir(exist_ok=True)
        (cwd / name / "__init__.py").write_text("decoy = True\n")
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.check_output([sys.executable, "-c", code], cwd=cwd, env=env, text=True)


IMPORT = """
import kernels, data_prep, fastssl.kernels, fastssl.data_prep, fastssl.configs
assert kernels.decoy and data_prep.decoy
print(fastssl.__file__, fastssl.kernels.__file__, fastssl.data_prep.__file__, fastssl.configs.__file__)
"""


def test_editable_install_imports_from_any_folder(tmp_path):
    found = [Path(f).parent for f in run_python(IMPORT, tmp_path).split()]
    assert found == [ROOT / folder for folder in INSTALLED]


def test_wheel_imports_from_any_folder(wheel, tmp_path):
    wheel.extractall(tmp_path / "site")
    found = run_python(IMPORT, tmp_path, tmp_path / "site").split()
    assert [Path(f).relative_to(tmp_path / "site").parts[:-1] for f in found] == [
        ("fastssl",),
        ("fastssl", "kernels"),
        ("fastssl", "data_prep"),
        ("fastssl", "configs"),
    ]


def test_commands_start_in_any_folder(tmp_path):
    """Also `python fastssl/train.py`, whose first import path is the folder that holds config.py, views.py, ..."""
    command = Path(sys.executable).with_name("fastssl")
    for start in ([command], [sys.executable, "-m", "fastssl", "train"], [sys.executable, ROOT / "fastssl/train.py"]):
        done = subprocess.run([*start, "--help"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "usage" in done.stdout.lower()


def test_make_prints_nothing_when_all_is_installed(tmp_path):
    (tmp_path / ".installed").touch()
    done = subprocess.run(["make", "setup", f"VENV={tmp_path}"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def stub(folder: Path, **programs: str) -> dict[str, str]:
    """An environment whose PATH holds these shell scripts and the basic tools alone."""
    folder.mkdir()
    for tool in ("bash", "env", "tail", "mktemp", "rm", "ls", "flock"):
        (folder / tool).symlink_to(shutil.which(tool))
    for name, body in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    return {"PATH": str(folder)}


def setup(env: dict[str, str], tmp_path: Path) -> str:
    command, nobody = ["bash", "tools/setup.sh", str(tmp_path / "venv")], subprocess.DEVNULL
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, stdin=nobody)
    assert done.returncode == 1 and not (tmp_path / "venv").exists()
    return done.stderr


def test_setup_names_unsuitable_pythons(tmp_path):
    env = stub(tmp_path / "bin", **{"python3": "echo 3.9", "python3.13": "exit 127"})
    message = setup(env, tmp_path)
    assert "3.10 to 3.13" in message and "python3 is 3.9" in message and "PYTHON=" in message
    assert "python3.13" not in message.replace("3.10 to 3.13", "")


COMPLETE = """if [ "$1" = - ]; then exit 0; fi; if [[ "$2" == *ctypes* ]]; then exit 0; fi; echo 3.12"""


def test_setup_names_missing_packages_without_apt(tmp_path):
    env = stub(tmp_path / "bin", **{"python3.12": COMPLETE, "pkg-config": "exit 1"})
    message = setup(env, tmp_path)
    assert "no apt" in message and "g++ libopencv-dev libturbojpeg0-dev." in message


def test_setup_names_missing_packages_without_root(tmp_path):
    bare = COMPLETE.replace("exit 0", "exit 1", 1)  # Debian's interpreter without python3.12-venv
    env = stub(tmp_path / "bin", **{"python3.12": bare, "apt-get": "exit 99", "id": "echo 1000"})
    message = setup(env, tmp_path)
    wanted = "apt-get install -y g++ pkg-config libopencv-dev libturbojpeg0-dev python3.12-venv python3.12-dev"
    assert "no sudo" in message and wanted in message


def test_setup_does_not_ask_for_a_password_without_a_terminal(tmp_path):
    sudo = 'echo "sudo $*"; exit 1'
    env = stub(tmp_path / "bin", **{"python3.12": COMPLETE, "apt-get": "", "id": "echo 1000", "sudo": sudo})
    message = setup(env, tmp_path)
    assert "sudo -n env" in message and "apt-get did not succeed" in message


def test_the_version_is_the_same_everywhere():
    (newest,) = re.findall(r"^## \[Unreleased\]$.*?^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d$", CHANGELOG, re.M | re.S)
    assert newest == yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == fastssl.__version__


def test_pre_commit_runs_what_make_lint_runs():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    commands = {hook["entry"].removesuffix(" --check") for hook in hooks}
    rule = (ROOT / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
    rule = rule.replace("$(PY)", ".venv/bin/python").replace("$(VENV)", ".venv")
    linted = set(re.findall(r"@(\S+ -m ruff \w+|bash \S+ \S+)", rule))
    assert len(linted) == 3 and commands == linted | {".venv/bin/python -m pytest tests/test_imports.py"}


READY = {"python3.12": COMPLETE, "pkg-config": "exit 0", "g++": "exit 0"}


@pytest.mark.parametrize(
    "extras, programs, expected",
    [
        ("test", {}, "no Chromium is installed (this machine has no apt)"),
        ("test,gpu", {"apt-get": "", "id": "echo 1000", "sudo": "exit 1"}, "no Chromium is installed (it needs root)"),
        (
            "test",
            {"apt-get": "[[ $2 != -s ]]", "id": "echo 0"},
            "no Chromium is installed (this machine's apt does not know all of: chromium-headless-shell)",
        ),
        (
            "test",
            {"apt-get": "[[ $1 == update || $2 == -s ]] || { echo broken; exit 1; }", "id": "echo 0"},
            "no Chromium is installed (apt-get did not succeed: broken)",
        ),
        ("test", {"apt-get": "", "id": "echo 0"}, "installing for the tests: chromium-headless-shell"),
        ("test", {"chromium": ""}, ""),
        ("gpu", {"apt-get": "exit 99", "id": "echo 0"}, ""),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_setup_installs_a_browser_only_for_the_tests(tmp_path, extras, programs, expected):
    """Without one it continues; the stub of Python then fails to make the environment."""
    env = stub(tmp_path / "bin", **READY, **programs) | {"EXTRAS": extras}
    message = setup(env, tmp_path)
    assert expected in message and ("hromium" in message) == bool(expected)
    assert ("no Chromium" in message) == ("no Chromium" in expected) and "installing into" in message
