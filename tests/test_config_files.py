"""Config files as users write them: own modules beside them, and mistakes answered in one line without our frames."""

import random
import re
import sys
from pathlib import Path

import pytest

from fastssl import config

ROOT = Path(__file__).parents[1]
SOURCE = (ROOT / "configs" / "simclr" / "r18_cifar10_200ep.py").read_text()
METHOD = "simclr.Config(temperature=0.2, dims=(2048, 256), norm=False),"


def load(folder, text, *overrides, name="mine.py"):
    path = folder / name
    path.write_text(text)
    return config.load(path, overrides)


def refusal(folder, text, name="mine.py"):
    with pytest.raises(ValueError) as error:
        load(folder, text, name=name)
    message = str(error.value)
    assert "\n" not in message and "Traceback" not in message
    return message


@pytest.mark.parametrize(
    "change, message",
    [
        (("warmup_epochs=10", "warmup_epOchs=10"), "did you mean 'warmup_epochs'? (arguments: name, lr, batch"),
        (("views.simclr(32, ", "views.simclr(32, scalE=(0.2, 1), "), "argument 'scalE'; did you mean 'scale'"),
        (
            ("simclr.Config(temperature", "simclr.Config(temprature"),
            "'temperature'? (arguments: temperature, dims, norm",
        ),
        (("views.simclr(32", "views.simlcr(32"), "has no attribute 'simlcr'; did you mean 'simclr'?"),
        (("=Optim(", "=Optm("), "NameError: name 'Optm' is not defined; did you mean 'Optim'?"),
        (("import simclr", "import simclrr"), "cannot import name 'simclrr' from 'fastssl.methods'"),
        (("from fastssl.methods", "from fastssl.method"), "No module named 'fastssl.method'; did you mean 'methods'?"),
        (("views.simclr(32", "views.simclr((32, 64)"), "View(size=(32, 64)): views are square, give one number"),
        (("    return Run(", "    run = 1 / 0\n    return Run("), "ZeroDivisionError: division by zero"),
        (("    return Run(", "    import sys; sys.exit(3)\n    return Run("), "SystemExit: 3"),
        (("    return Run(", "    get_config()\n    return Run("), "RecursionError"),
    ],
)
def test_an_error_in_the_file_names_file_line_and_the_nearest_name(tmp_path, change, message):
    assert change[0] in SOURCE
    text = SOURCE.replace(*change, 1)
    answer = refusal(tmp_path, text)
    assert message in answer, answer
    first, last = (
        next(i for i, line in enumerate(text.splitlines(), 1) if part in line)
        for part in (change[1].splitlines()[0], change[1].splitlines()[-1])
    )
    assert int(re.match(rf"{tmp_path}/mine.py, line (\d+): ", answer)[1]) in range(first - 1, last + 1), answer


@pytest.mark.parametrize(
    "change, message",
    [
        (("    return Run(", "    run = Run("), "returned NoneType, not fastssl.config.Run"),
        (("method=simclr.Config(", "method=dict("), "a dataclass with build(backbone, ...)"),
        ((METHOD, "simclr,"), "give its Config, simclr.Config(...)"),
        ((METHOD, "simclr.Config,"), "give an instance, Config(...)"),
        (("optim=Optim(", "optim=dict("), "optim must be Optim(...)"),
        (("optim=Optim(", "seed=-1, optim=Optim("), "seed=-1 must be at least 0 and finite"),
        (("optim=Optim(", "seed='x', optim=Optim("), "seed: expected int, got 'x'"),
        (("optim=Optim(", "deterministic=1, optim=Optim("), "deterministic: expected bool, got 1"),
        (("lr=0.4", "lr=10**400"), "optim.lr: an integer too large"),
        ((" batch=256,", " batch=2**70,"), "optim.batch: a number of more than 64 bits"),
        (("views=views", "views=(1, 2), eval_view=views"), "data.views.0 must be a View, got 1"),
        (("views=views", "eval_view=views.center(32), views=views"), "data.eval_view must be one View or None"),
    ],
)
def test_a_wrong_value_in_the_file_is_named(tmp_path, change, message):
    text = SOURCE.replace(*change, 1)
    assert text != SOURCE
    assert message in refusal(tmp_path, text)


def test_a_setting_that_is_assigned_under_a_wrong_name_is_found(tmp_path):
    text = SOURCE.replace("    return Run(", "    run = Run(", 1) + "    run.optim.lrr = 1.0\n    return run\n"
    assert "optim.lrr: unknown setting 'lrr'; did you mean 'lr'?" in refusal(tmp_path, text)


@pytest.mark.parametrize("name, meant", [("lr", "optim.lr"), ("temperature", "method.temperature"), ("oprim", "optim")])
def test_a_setting_without_its_group_is_found(tmp_path, name, meant):
    (tmp_path / "c.py").write_text(SOURCE)
    with pytest.raises(ValueError, match=f"^{name}: unknown setting '{name}'; did you mean '{meant}'"):
        config.load(tmp_path / "c.py", [f"{name}=1"])


def test_files_that_python_cannot_parse_raise(tmp_path):
    assert "line 1: SyntaxError" in refusal(tmp_path, "def get_config(:\n")
    assert "never closed (x = [)" in refusal(tmp_path, "x = [")
    for data in (b"\xff\xfe\x00", b"# \xe4\n", SOURCE.encode()[:100] + b"\0", b"\x7fELF" * 50):
        (tmp_path / "bytes.py").write_bytes(data)
        with pytest.raises(ValueError, match=r"bytes\.py"):
            config.load(tmp_path / "bytes.py")
    assert "SyntaxError" in refusal(tmp_path, "# fastssl\n\nSelf-supervised pretraining\n", name="README.md")


def damaged(rng: random.Random) -> str:
    """The config with one to three faults: misspelt words, other values, cut, foreign characters, lost lines."""
    values = (
        "None",
        "-1",
        "0",
        "1.5",
        "'x'",
        "[]",
        "{}",
        "float('nan')",
        "10**400",
        "True",
        "object()",
        "lambda: 1",
        "(1, 2, 3)",
        "b'x'",
        "1j",
        "range(3)",
        "...",
        "Optim",
        "views",
        "{1: 2}",
    )
    text = SOURCE
    for _ in range(rng.choice((1, 1, 2, 3))):
        words, given = list(re.finditer(r"[A-Za-z_]\w+", text)), list(re.finditer(r"(?<==)[^=,()\n]+", text))
        fault = rng.randrange(6)
        if fault == 0 and words:
            at = rng.choice(words).start()
            text = text[:at] + rng.choice("abcXYZ_") + text[at + 1 :]
        elif fault == 1 and given:
            at = rng.choice(given)
            text = text[: at.start()] + rng.choice(values) + text[at.end() :]
        elif fault == 2 and text:
            text = text[: rng.randrange(len(text))]
        elif fault == 3 and text:
            at = rng.randrange(len(text))
            text = text[:at] + chr(rng.choice((0, 10, 34, 40, 41, 58, 92, 228, 65279))) + text[at + 1 :]
        elif fault == 4 and text:
            lines = text.split("\n")
            lines.insert(rng.randrange(len(lines)), lines.pop(rng.randrange(len(lines))))
            text = "\n".join(lines)
        elif words:
            one, other = rng.choice(words), rng.choice(words).group()
            text = text[: one.start()] + other + text[one.end() :]
    return text


@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
def test_damaged_config_files_load_or_raise_a_one_line_error(tmp_path):
    rng, refused = random.Random(0), 0
    for i in range(300):
        text = damaged(rng)
        try:
            load(tmp_path, text, name=f"c{i}.py")
        except ValueError as error:
            assert "\n" not in str(error), text
            refused += 1
    assert refused > 200


OWN = SOURCE.replace("from fastssl.methods import simclr", "import my_method as simclr")


def test_a_module_beside_the_config_is_imported_and_hides_no_library(tmp_path):
    (tmp_path / "my_method.py").write_text((ROOT / "fastssl" / "methods" / "simclr.py").read_text())
    before = list(sys.path)
    try:
        run = load(tmp_path, OWN, "method.temperature=0.7")
        assert type(run.method).__module__ == "my_method" and run.method.temperature == 0.7
        assert sys.path == [*before, str(tmp_path)]
        (tmp_path / "bad_method.py").write_text("\n\nx = undefined\n")
        answer = refusal(tmp_path, OWN.replace("my_method", "bad_method"))
        assert f"{tmp_path}/bad_method.py, line 3: NameError: name 'undefined' is not defined" in answer
    finally:
        sys.path[:] = before
        sys.modules.pop("my_method", None)


def test_a_dataclass_in_the_config_file_keeps_its_annotations(tmp_path):
    text = SOURCE.replace(
        "def get_config",
        """
import dataclasses
@dataclasses.dataclass(frozen=True)
class Mine:
    weight: float = 1.0
    dims: "tuple[int, ...]" = (3, 4)
    def build(self, backbone, context): ...


def get_config""",
    ).replace(METHOD, "Mine(),")
    text = text[text.index('"""', 3) + 3 :].lstrip()
    run = load(tmp_path, "from __future__ import annotations\n" + text, "method.weight=3", "method.dims=[1]")
    assert (run.method.weight, run.method.dims) == (3.0, (1,))
    assert config.dump(run)["method"] == {"type": "fastssl_config_mine.Mine", "weight": 3.0, "dims": [1]}
    with pytest.raises(ValueError, match="method.weight: expected float, got 'x'"):
        load(tmp_path, "from __future__ import annotations\n" + text, "method.weight=x")


def test_a_file_that_changes_within_a_second_is_read_again(tmp_path):
    assert load(tmp_path, SOURCE.replace("lr=0.4", "lr=0.1")).optim.lr == 0.1
    assert load(tmp_path, SOURCE.replace("lr=0.4", "lr=0.2")).optim.lr == 0.2
