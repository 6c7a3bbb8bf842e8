"""Mistakes that are found in the text of a config file, before torch is imported, with the messages of a real run."""

import random
import re
from pathlib import Path

import pytest
from test_config_files import METHOD, SOURCE, damaged
from test_help import HEAVY, answered_without

from fastssl import config, methods, views
from fastssl.config import source, typos

ROOT = Path(__file__).parents[1]
CONFIGS = [path for path in (ROOT / "configs").rglob("*.py") if path.name != "__init__.py"]
IN_THE_FILE = [
    ("warmup_epochs=10", "warmup_epOchs=10"),
    ("views.simclr(32, ", "views.simclr(32, scalE=(0.2, 1), "),
    ("simclr.Config(temperature", "simclr.Config(temprature"),
    ("views.simclr(32", "views.simlcr(32"),
    ("=Optim(", "=Optm("),
    ("import simclr", "import simclrr"),
    ("Optim, Run", "Optin, Run"),
    ("import views", "import view"),
    ('name="lars"', 'name="lras"'),
    ("lr=0.4", "lr=-0.4"),
    ("lr=0.4", "lr='0.4'"),
    ("temperature=0.2", "temperature='0.2'"),
    ("dims=(2048, 256)", "dims=('2048', 256)"),
    ("lr=0.4", "lr=10**400"),
]
OVERRIDES = [
    "optim.lrr=1",
    "optm.lr=1",
    "lr=1",
    "optim.lr=-1",
    "optim.lr=x",
    "optim.lr",
    "optim.name=lras",
    "data.view=1",
    "log.keep=0",
    "seed=x",
    "method=simclrr",
    "method=byol(momentun=0.9)",
    "method.temprature=1",
    "method.temperature=x",
    "method.dims=(1, 'a')",
    "method.dims=(1, -1)",
    "method.temperature=-1",
    "data.views=simlcr",
    "data.eval_view=centre",
    "backbone.stem=cifer",
]


def answer(path, overrides=()):
    """The message of config.load, None where it accepts the file."""
    try:
        config.load(path, overrides)
    except ValueError as error:
        return str(error)
    return None


def static_answer(path, overrides=()):
    try:
        typos.check(path, overrides)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("change", IN_THE_FILE)
def test_the_early_message_equals_that_of_running_the_file(tmp_path, change, monkeypatch):
    path = tmp_path / "mine.py"
    assert change[0] in SOURCE
    path.write_text(SOURCE.replace(*change, 1))
    found = static_answer(path)
    monkeypatch.setattr(typos, "check", lambda *_: None)
    assert found == answer(path) or change[1] == "lr=10**400"
    assert (found is None) == (change[1] == "lr=10**400")  # not a literal: passed over


@pytest.mark.parametrize("override", OVERRIDES)
def test_the_early_message_about_an_override_equals_that_of_running_the_file(tmp_path, override, monkeypatch):
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    found = static_answer(path, [override])
    monkeypatch.setattr(typos, "check", lambda *_: None)
    assert found and found == answer(path, [override])


@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
def test_no_file_that_loads_is_refused(tmp_path, monkeypatch):
    rng, path, found = random.Random(1), tmp_path / "c.py", []
    texts = [SOURCE, *(damaged(rng) for _ in range(120))]
    check = typos.check
    monkeypatch.setattr(typos, "check", lambda *_: None)
    for text in texts:
        path.write_text(text)
        try:
            check(path)
        except ValueError as error:
            found.append((str(error), answer(path), text))
    assert len(found) > 30
    for ours, theirs, text in found:
        assert theirs is not None, (ours, text)
    assert sum(ours == theirs for ours, theirs, _ in found) > 0.7 * len(found)  # of two mistakes either may be named


def test_our_configs_pass():
    assert len(CONFIGS) > 40 and not [path for path in CONFIGS if static_answer(path)]


@pytest.mark.parametrize("name", methods.names())
def test_the_settings_of_a_method_are_read_from_its_source(name):
    real = config.names.config_of(name)
    light = source.method_config(name)
    assert light is not real and config.settings.names(light) == config.settings.names(real)
    assert config.settings.field_types(light) == config.settings.field_types(real) and vars(light()) == vars(real())


@pytest.mark.parametrize("name", methods.names())
def test_impossible_numbers_are_refused_by_their_setting(name):
    made = config.names.config_of(name)()
    for key, value in vars(made).items():
        numbers = value if isinstance(value, tuple) else (value,)
        if type(numbers[0]) not in (int, float):
            continue
        for wrong in ("-1", "-1.0", "1e999") if type(numbers[0]) is float else ("-1",):
            text = f"method.{key}=" + (f"({', '.join([wrong] * len(value))},)" if isinstance(value, tuple) else wrong)
            with pytest.raises(ValueError, match=rf"^method\.{key}=.* must be (at least|above) "):
                config.load(ROOT / f"configs/smoke/{name}.py", [text])


def test_the_recipes_are_read_from_their_source():
    with pytest.raises(ValueError) as error:
        config.names.recipe("x", (), "data.views")
    assert list(source.recipes()) == re.search(r" of (.*)$", str(error.value))[1].split("; ")[0].split(", ")
    for name, parameters in source.recipes().items():
        assert getattr(views, name) and {"size", "mean", "extra"} <= set(parameters)


@pytest.mark.parametrize(
    "change",
    [
        ("    return Run(", "    if False:\n        Optm\n    return Run("),
        ("    return Run(", "    exec('Optm = 1')\n    return Run("),
        ("    return Run(", "    f = lambda: Optm\n    return Run("),
        ("from fastssl import views", "from __future__ import annotations\nfrom fastssl import views"),
        ("def get_config", "def unused(): return Optm(lrr=1)\ndef get_config"),
        ("    return Run(", "    x: Optm\n    return Run("),
        ("    return Run(", "    from fastssl.config import Optim as Optm; Optm(lr=1)\n    return Run("),
        (
            "    return Run(",
            "    views.mine = lambda size, mine: views.simclr(size)\n    views.mine(3, mine=2)\n    return Run(",
        ),
        ("def get_config", "from types import SimpleNamespace as Speed\nSpeed(x=1)\ndef get_config"),
        (METHOD, "simclr.Config(**{'temperature': 0.2}),"),
        ("    return Run(", "    return Run(**{}, **dict(seed=3), "),
    ],
)
def test_code_that_may_be_right_is_not_reported(tmp_path, change):
    path = tmp_path / "mine.py"
    text = SOURCE.replace(*change, 1)
    if "annotations" in text:  # they are not evaluated
        text = text.replace("get_config() -> Run", "get_config() -> Unknown")
    assert text != SOURCE
    path.write_text(text)
    assert static_answer(path) is None and answer(path) is None


def test_mistakes_in_a_config_import_no_torch(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(SOURCE.replace("=Optim(", "=Optm(", 1))
    smoke = str(ROOT / "configs/smoke/simclr.py")
    commands = [
        ["train", str(path)],
        *(["train", smoke, override] for override in OVERRIDES),
        ["train", "smoke/simcl.py"],
    ]
    commands += [
        ["train", "--help"],
        ["train", "optim.lrr=1", smoke],
        ["train", smoke, smoke],
        ["train", smoke, "--forse"],
    ]
    for argv, code, said in answered_without(HEAVY, commands):
        assert code == (0 if "--help" in argv else 2) and (said.count("\n") == 1) == ("--help" not in argv), (
            argv,
            said,
        )
