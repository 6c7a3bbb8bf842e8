"""bench/lease.py: its commands exist, and a later call goes on where the former stopped."""

import json
import sys
from pathlib import Path

import pytest

from fastssl import config

ROOT = Path(__file__).parents[1]


@pytest.fixture
def lease(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "bench")
    import lease

    (tmp_path / "bench" / "results").mkdir(parents=True)
    monkeypatch.setattr(lease, "ROOT", tmp_path)
    return lease


def test_every_item_can_be_started(lease):
    items = lease.items("0123456789ab+changes")
    assert len({i.name for i in items}) == len(items)
    for item in items:
        for word in item.command:
            if word.startswith("configs/"):
                overrides = [w for w in item.command if "=" in w and not w.startswith("-")]
                config.load(ROOT / word, overrides)
            elif word.endswith(".py"):
                assert (ROOT / word).exists(), word


def test_a_second_call_continues_with_the_remaining_items(lease, monkeypatch, capsys):
    ran = lease.ROOT / "ran"
    script = "import sys; open(sys.argv[1], 'a').write(sys.argv[2]); sys.exit(int(sys.argv[3]))"
    made = [
        lease.Item(name, [sys.executable, "-c", script, str(ran), name, rc], 60, files)
        for name, rc, files in (("a", "0", ()), ("b", "3", ()), ("c", "0", ("absent.beton",)))
    ]
    monkeypatch.setattr(lease, "items", lambda commit: made)
    monkeypatch.setattr(sys, "argv", ["lease.py"])
    assert lease.main() == 1
    assert lease.main() == 1
    assert ran.read_text() == "abb"  # a is finished, b is tried again, c lacks its file
    out = capsys.readouterr().out
    assert "b: exit status 3" in out
    assert "c: skipped, absent.beton does not exist" in out
    (state,) = (lease.ROOT / "bench" / "results").glob("*-lease.json")
    assert {name: entry["rc"] for name, entry in json.loads(state.read_text()).items()} == {"a": 0, "b": 3}


def test_an_item_at_its_limit_is_told_to_stop_with_its_children_and_the_next_one_runs(lease, monkeypatch, capsys):
    """The first ignores SIGTERM and has started another process; the second uses it to write a checkpoint."""
    ran, child = lease.ROOT / "ran", "import time; time.sleep(60)"
    stubborn = "import signal, subprocess, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    stubborn += f"open({str(ran)!r}, 'a').write(str(subprocess.Popen([sys.executable, '-c', {child!r}]).pid) + ' ')\n"
    polite = "import signal, sys, time\n"
    polite += f"signal.signal(signal.SIGTERM, lambda *_: (open({str(ran)!r}, 'a').write('saved '), sys.exit(75)))\n"
    made = [
        lease.Item(name, [sys.executable, "-c", script + "time.sleep(60)"], 2)
        for name, script in (("stubborn", stubborn), ("polite", polite))
    ]
    made.append(lease.Item("last", [sys.executable, "-c", f"open({str(ran)!r}, 'a').write('last')"], 30))
    monkeypatch.setattr(lease, "items", lambda commit: made)
    monkeypatch.setattr(lease, "STOP", 1)
    monkeypatch.setattr(sys, "argv", ["lease.py"])
    assert lease.main() == 1
    pid, *rest = ran.read_text().split()
    assert rest == ["saved", "last"]
    assert not Path(f"/proc/{pid}").exists() or "Z (zombie)" in Path(f"/proc/{pid}/status").read_text()
    assert capsys.readouterr().out.count("exit status 124") == 2


def test_an_unknown_item_is_refused(lease, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lease.py", "--only", "nothing"])
    assert lease.main() == 2
    assert "no item begins with nothing" in capsys.readouterr().err
