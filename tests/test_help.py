"""--help: quick, complete, and every default is named."""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import warnings

import pytest

import fastssl.eval
from fastssl import __main__ as command
from fastssl import methods, parsing
from fastssl.eval import options

HEAVY = ("torch", "timm", "ffcv", "numpy", "deepspeed", "PIL")  # 4 to 7 s of CPU


def answered_without(heavy, commands):
    """The commands' exit codes, with what they print, in one process, which must not have imported `heavy`."""
    code = f"""
import contextlib, io, json, sys
from fastssl.__main__ import main
for argv in {commands!r}:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try:
            code = main(argv)
        except SystemExit as stop:
            code = stop.code
    print(json.dumps([argv, code, out.getvalue(), [name for name in {heavy!r} if name in sys.modules]]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        argv, code, said, imported = json.loads(line)
        assert not imported, (argv, imported)
        yield argv, code, said


def test_help_and_misspelt_options_import_no_torch():
    names = (*(command.COMMANDS.keys() - {"convert"}), *(f"eval {name}" for name in fastssl.eval.PROTOCOLS))
    helps = [["--help"], *([*name.split(), "--help"] for name in names)]
    wrong = {
        ("tran",): "'train'",
        ("eval", "liner"): "'linear'",
        ("eval", "knn", "--trian", "."): "unrecognized arguments: --trian; did you mean '--train'?",
        ("eval", "knn", "--tempreature=1"): "unrecognized arguments: --tempreature=1; did you mean '--temperature'?",
        ("eval", "svm", "--solver", "fsat"): "; did you mean 'fast'?",
        ("eval", "knn", "--k", "1,x"): "--k: '1,x' is not a comma-separated list",
        ("export", ".", "--to", "tim"): "; did you mean 'timm'?",
        ("export", "fastsl/train.py"): "RUN_OR_WEIGHTS: no run folder or weight file fastsl/train.py; see",
        ("publish", __file__.replace("help", "hlep")): "; did you mean 'test_help.py'?",
        ("eval", "knn", "nowhere"): "no run folder or weight file nowhere",
        ("upgrade", "no/where", "x.pth"): "no run folder or weight file no/where; see",
        ("export", "x" * 300): "no run folder or weight file xxx",
        ("params",): "the following arguments are required: CONFIG|BACKBONE; see",
        ("replay", "--device", "cpu"): "the following arguments are required: config; see",
        ("report", "x", "--point", "5"): "unrecognized arguments: --point 5; did you mean '--points'?",
    }
    commands = [*helps, *map(list, wrong)]
    answers = list(answered_without(HEAVY, commands))
    assert len(answers) == len(commands)
    for argv, code, said in answers[: len(helps)]:
        assert code == 0 and said.startswith("usage: fastssl"), argv
    for argv, code, said in answers[len(helps) :]:
        assert code == 2 and said.count("\n") == 1 and wrong[tuple(argv)] in said, said


def test_help_of_convert_imports_no_torch():
    """It needs Pillow and NumPy, which are imported quickly."""
    [(_, code, said)] = answered_without(("torch", "timm", "ffcv", "deepspeed"), [["convert", "--help"]])
    assert code == 0 and said.startswith("usage: fastssl convert")


def test_option_choices_are_those_of_the_protocols():
    from fastssl import amp
    from fastssl.eval import detection, linear, svm
    from fastssl.eval.common import search
    from fastssl.options import EXPORT_TARGETS
    from fastssl.weights import export

    for protocol, option, known in (
        ("knn", "--backend", search.BACKENDS),
        ("knn", "--precision", amp.DTYPES),
        ("svm", "--solver", svm.SOLVERS),
        ("linear", "--recipe", ("probe", *linear.RECIPES)),
        ("detection", "--schedule", detection.SCHEDULES),
    ):
        action = next(a for a in options.parser(protocol)._actions if option in a.option_strings)
        assert tuple(action.choices) == tuple(known), option
    assert tuple(export.TARGETS) == EXPORT_TARGETS


def test_a_closed_pipe_prints_no_traceback():
    source, sink = os.pipe()
    os.close(source)
    done = subprocess.run([sys.executable, "-m", "fastssl", "--help"], stdout=sink, stderr=subprocess.PIPE, text=True)
    os.close(sink)
    assert (done.returncode, done.stderr) == (141, "")


def test_help_names_every_protocol(capsys):
    assert command.main(["--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert all(name in said for name in (*command.COMMANDS, *fastssl.eval.PROTOCOLS))


def parsers():
    """(name, parser) of every command that takes options."""
    for name in fastssl.eval.PROTOCOLS:
        yield f"eval {name}", options.parser(name)
    for name in sorted(command.COMMANDS.keys() - {"eval", "methods"}):
        made = []
        with pytest.MonkeyPatch.context() as patch:

            def stop(self, *_, made=made, **__):
                made.append(self)
                raise SystemExit(0)

            patch.setattr(argparse.ArgumentParser, "parse_args", stop)
            patch.setattr(argparse.ArgumentParser, "parse_intermixed_args", stop)
            patch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
            with contextlib.suppress(SystemExit):
                command.main([name, "x", "y"])
        yield name, made[0]


def test_every_default_is_named():
    """Of every option that holds a value where it is not given."""
    silent = []
    for name, parser in parsers():
        for action in parser._actions:
            if not action.option_strings or action.help == argparse.SUPPRESS or isinstance(action.default, bool):
                continue
            if action.default is None or action.default in ([], argparse.SUPPRESS):
                continue
            said = action.help and parser._get_formatter()._expand_help(action)
            silent += [] if said and "default" in said else [f"fastssl {name} {action.option_strings[0]}"]
    assert not silent


def test_a_missing_gpu_is_a_one_line_error(capsys, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device, said in (
        ("cuda", "finds no GPU on this machine; use cpu"),
        ("gpu", "device='gpu': cpu or cuda"),
        ("cuda:1", "device='cuda:1': cpu or cuda (CUDA_VISIBLE_DEVICES=1 selects a GPU)"),
    ):
        assert command.main(["eval", "knn", "--features", "pixels", "--device", device]) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1


def test_warnings_of_fastssl_are_short_and_others_unchanged(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    before = warnings.formatwarning("slow", UserWarning, "/elsewhere/mine.py", 3)
    parsing.shorten_warnings()
    assert warnings.formatwarning("slow", UserWarning, options.__file__, 3) == "warning: slow\n"
    assert warnings.formatwarning("slow", UserWarning, "/elsewhere/mine.py", 3) == before


def test_a_method_is_described_without_warnings_about_its_training():
    assert "state    target, pointers, queue" in methods.describe("moco")  # pytest makes warnings errors
