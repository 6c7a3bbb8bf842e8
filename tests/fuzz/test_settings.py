"""Configs, overrides, options and variables of launchers: what is wrong is answered in one line."""

import contextlib
import io
import random

from mutations import both, fuzz
from test_config_files import damaged as damaged_config

import fastssl.views  # noqa: F401  (before the first case: torch's compiler, which it imports, makes a folder in /tmp)
from fastssl import config, data_prep
from fastssl import eval as evaluation
from fastssl.config import checks, settings
from fastssl.eval import options

VALUES = [
    "",
    "x",
    "-1",
    "0",
    "1",
    "1.5",
    "1e999",
    "nan",
    "None",
    "true",
    "()",
    "[1]",
    "{}",
    "(1, 'a')",
    "'",
    "((",
    "\0",
]
VALUES += [
    "9" * 30,
    "9" * 5000,
    "(" * 500,
    "__import__('os').mkdir('bombed')",
    "lambda: 1",
    "a=b",
    "é",
    "\ud800",
    "1_0",
]
CALLS = ["byol", "moco(queue=4)", "simclr(temperature=-1)", "swav(1, 2, 3)", "byol(x=1)", "simclr(__class__)", "a.b()"]
CALLS += ["center(224, 256)", "simclr(32", "dino(small=-1)", "mae(size='x')", "patches(resize=None)", "f(**{})"]
SMOKE = config.quickstart().parent / "smoke" / "simclr.py"


def typed(word: str, rng: random.Random) -> str:
    """The word, or with a letter too much, too few or another."""
    at, how = rng.randrange(len(word) + 1), rng.randrange(6)
    letter = rng.choice("abz_.=-")
    return {
        0: word[:at] + letter + word[at:],
        1: word[:at] + word[at + 1 :],
        2: word[:at] + letter + word[at + 1 :],
    }.get(how, word)


@both
def test_damaged_config_files(tmp_path, cases):
    def make(rng, case):
        path = tmp_path / "c.py"
        path.write_text(damaged_config(rng))
        return path

    fuzz(make, config.load, cases, tmp_path)


@both
def test_damaged_overrides(tmp_path, cases):
    run = config.load(SMOKE)
    keys = ["method", "data.views", "data.eval_view", "data.views.0.size", "data.views.all.blur", "optim.paramwise.x"]
    keys += [
        *settings.names(run),
        "backbone.options.x",
        "deepspeed.x.y",
        "hooks.0.x",
        "",
        ".",
        "optim..lr",
        "optim.betas.0",
    ]
    sections = {**checks.SECTIONS, "method": type(run.method)}
    keys += [f"{name}.{key}" for name, kind in sections.items() for key in settings.names(kind)]

    def make(rng, _):
        given = []
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            key = typed(rng.choice(keys), rng)
            value = rng.choice(CALLS if key.startswith(("method", "data.")) and rng.random() < 0.6 else VALUES)
            given.append(key + rng.choice(["=", "=", "=", "", "=="]) + value)
        return given

    fuzz(make, lambda given: config.load(SMOKE, given), cases, tmp_path, longest=20_000)  # what was typed is repeated


@both
def test_damaged_command_lines(tmp_path, cases):
    """Of `fastssl eval` and `fastssl convert`: exit code 2 and one line."""
    words = {name: _words(options.parser(name)) for name in evaluation.PROTOCOLS}
    words["convert"] = [*data_prep_words(), "imagefolder", "list", "cifar10", str(tmp_path), str(tmp_path / "o.beton")]

    def make(rng, _):
        name = rng.choice(list(words))
        rest = [rng.choice([typed(rng.choice(words[name]), rng), rng.choice(VALUES)]) for _ in range(rng.randint(1, 4))]
        return name, [word for word in rest if word not in ("-h", "--help")]

    def read(given):
        name, rest = given
        with contextlib.redirect_stderr(io.StringIO()) as said:
            if name == "convert":
                code = data_prep.main(rest)
            else:
                try:
                    options.parser(name).parse_args(rest)
                    return
                except SystemExit as stop:
                    code = stop.code
        if code:
            assert code == 2 and said.getvalue().count("\n") == 1, (given, said.getvalue())
            raise ValueError(said.getvalue().strip())

    fuzz(make, read, cases, tmp_path, longest=50_000)


def _words(parser) -> list[str]:
    return [name for action in parser._actions for name in action.option_strings]


def data_prep_words() -> list[str]:
    from fastssl.data_prep import cli

    return _words(cli._parser())


@both
def test_damaged_hostfiles(tmp_path, cases):
    """They are DeepSpeed's: its reader refuses what it does not understand before it starts anything."""
    from deepspeed.launcher import runner

    lines = [
        "worker-0 slots=4",
        "worker-1 slots=2",
        "10.0.0.1 slots=8",
        "# comment",
        "",
        "worker-0",
        "worker-2 slots=x",
    ]
    lines += ["$(touch bombed) slots=1", "; slots=2", "a slots=99999999999999999999", "\t", "é slots=1"]
    path = tmp_path / "hosts"

    def make(rng, _):
        text = "\n".join(typed(rng.choice(lines), rng) for _ in range(rng.randint(0, 4)))
        path.write_bytes(text.encode("utf-8", "surrogatepass"))

    runner.logger.disabled = True
    try:
        fuzz(make, lambda _: runner.fetch_hostfile(str(path)), cases, tmp_path)
    finally:
        runner.logger.disabled = False
