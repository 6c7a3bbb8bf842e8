"""`fastssl quickstart` prints the command that it runs."""

import shlex
import subprocess

from fastssl import config, quickstart


def test_the_printed_command_is_the_one_that_runs(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(subprocess, "run", lambda command, env, check: calls.append((command, env)))
    monkeypatch.setattr(quickstart.torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(config.quickstart().parents[1])
    quickstart.pretrain(config.load(config.quickstart(), [f"log.root={tmp_path}"]), ["optim.epochs=1"])
    [(command, environment)] = calls
    prompt, *words = shlex.split(capsys.readouterr().out)
    start = words.index("deepspeed")
    assert prompt == "$" and dict(word.split("=") for word in words[:start]).items() <= environment.items()
    assert words[:start] and words[start + 1 :] == command[-len(words[start + 1 :]) :]
    assert words[-2:] == ["configs/quickstart.py", "optim.epochs=1"]
