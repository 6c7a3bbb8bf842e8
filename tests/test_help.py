"""--help: quick, complete, and every default is named."""

import argparse
import contextlib
import importlib
import os
import subprocess
import sys

import pytest

import fastssl.eval
from fastssl import __main__ as command


@pytest.mark.parametrize("argv", [["--help"], ["eval", "--help"], ["eval"], ["tran"], ["eval", "liner"]])
def test_help_and_misspelt_commands_import_no_torch(argv):
    """torch, timm and FFCV take 4 to 7 s of CPU."""
    code = f"import sys; from fastssl.__main__ import main; main({argv!r}); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {name for name in ("torch", "timm", "ffcv", "numpy", "deepspeed", "PIL") if f"'{name}'" in done.stdout}
    assert not heavy and "'fastssl.eval'" in done.stdout


def test_a_reader_that_has_gone_is_not_a_traceback():
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
        yield f"eval {name}", fastssl.eval.parser(name, importlib.import_module(f"fastssl.eval.{name}"))
    for name in sorted(command.COMMANDS.keys() - {"eval", "methods"}):
        made = []
        with pytest.MonkeyPatch.context() as patch:

            def stop(self, *_, made=made, **__):
                made.append(self)
                raise SystemExit(0)

            patch.setattr(argparse.ArgumentParser, "parse_args", stop)
            patch.setattr(argparse.ArgumentParser, "parse_intermixed_args", stop)
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


def test_a_gpu_that_is_not_there_is_one_line(capsys, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device, said in (("cuda", "finds no GPU on this machine; use cpu"), ("gpu", "device='gpu': cpu or cuda")):
        assert command.main(["eval", "knn", "--features", "pixels", "--device", device]) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1
