"""docs/from_openselfsup.md names commands, settings, recipes and configs that exist."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from fastssl import config, methods, views
from fastssl.__main__ import COMMANDS
from fastssl.kernels.augment import View
from fastssl.weights.export import TARGETS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "from_openselfsup.md").read_text()
CODE = re.findall(r"`([^`]+)`", TEXT) + re.findall(r"^    (\S.*)$", TEXT, re.M)
RIGHT = [line.split("|")[2] for line in TEXT.splitlines() if line.startswith("|")]
OURS = [code for cell in RIGHT for code in re.findall(r"`([^`]+)`", cell) if code != "log.jsonl"]


def test_commands_exist():
    used = {m[1] for code in CODE if (m := re.match(r"fastssl (\w+)", code))}
    assert {"train", "export", "publish", "params", "upgrade", "doctor", "convert", "eval"} <= used <= set(COMMANDS)
    assert {m[1] for code in CODE for m in re.finditer(r"--to (\w+)", code)} <= set(TARGETS)


@pytest.mark.parametrize(
    "section, kind",
    [
        ("backbone", config.Backbone),
        ("data", config.Data),
        ("optim", config.Optim),
        ("speed", config.Speed),
        ("log", config.Log),
    ],
)
def test_settings_exist(section, kind):
    used = {m[1] for code in OURS for m in re.finditer(rf"\b{section}\.(\w+)", code)}
    assert used and used <= {f.name for f in dataclasses.fields(kind)}


def test_methods_and_their_settings_exist():
    names = {f"configs/{m[1]}" for code in CODE if (m := re.search(r"configs/(\w+/\w+\.py)", code))}
    assert names and all((ROOT / name).is_file() for name in names)
    used = {m[1] for code in OURS for m in re.finditer(r"\bmethod\.(\w+)", code)}
    known = set()
    for name in methods.names():
        module = __import__(f"fastssl.methods.{name}", fromlist=["Config"])
        known |= {f.name for f in dataclasses.fields(module.Config)}
    assert used and used <= known


CONFIGS = re.findall(r"^\| `([\w/]+\.py)` \| `(configs/\S+\.py) ?(.*)` \|$", TEXT, re.M)


def test_every_pretraining_config_has_a_command_line():
    """The names are those of OpenSelfSup at the end of 2020 (version 0.3)."""
    folders = [name.split("/")[-2] for name, *_ in CONFIGS]
    count = {
        "relative_loc": 1,
        "rotation_pred": 2,
        "deepcluster": 2,
        "odc": 1,
        "npid": 2,
        "moco": 4,
        "simclr": 3,
        "byol": 3,
    }
    assert {folder: folders.count(folder) for folder in folders} == {**count, "imagenet": 1, "cifar10": 1}


@pytest.mark.parametrize("name, path, overrides", CONFIGS, ids=[name for name, *_ in CONFIGS])
def test_the_command_lines_load(name, path, overrides):
    run = config.load(ROOT / path, shlex.split(overrides))
    assert run.optim.precision == ("fp16" if "fp16" in name else "fp32")
    if "cifar10" in name:
        assert (run.backbone.name, run.optim.epochs, run.optim.milestones) == ("resnet50", 350, (150, 250))


def test_views_exist():
    assert {m[1] for code in OURS for m in re.finditer(r"\bviews\.(\w+)\(", code)} <= set(vars(views))
    used = {m[1] for code in OURS for m in re.finditer(r"\b(\w+)=\.\.\.", code)}
    assert {"scale", "flip", "rotate"} <= used
    fields = {f.name for kind in (View, config.Optim) for f in dataclasses.fields(kind)}
    assert used <= fields
