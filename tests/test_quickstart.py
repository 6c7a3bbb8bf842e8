"""`fastssl quickstart` prints the command that it runs, and continues where it was interrupted."""

import shlex
import subprocess

from fastssl import config, quickstart
from fastssl.checkpoint import disk


def test_the_printed_command_is_the_one_that_runs(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(subprocess, "run", lambda command, env, check: calls.append((command, env)))
    monkeypatch.setattr(quickstart.torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(config.quickstart().parents[1])
    run = config.load(config.quickstart(), [f"log.root={tmp_path}"])
    disk.directory(tmp_path / run.name).mkdir(parents=True)  # also a run that was interrupted has checkpoints
    quickstart.pretrain(run, ["optim.epochs=1"])
    [(command, environment)] = calls
    prompt, *words = shlex.split(capsys.readouterr().out)
    start = words.index("deepspeed")
    assert prompt == "$" and dict(word.split("=") for word in words[:start]).items() <= environment.items()
    assert words[:start] and words[start + 1 :] == command[-len(words[start + 1 :]) :]
    assert words[-3:] == ["configs/quickstart.py", "optim.epochs=1", "--continue"]
