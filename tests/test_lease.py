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
    items = lease.items()
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
    monkeypatch.setattr(lease, "items", lambda: made)
    monkeypatch.setattr(sys, "argv", ["lease.py"])
    assert lease.main() == 1
    assert lease.main() == 1
    assert ran.read_text() == "abb"  # a is finished, b is tried again, c lacks its file
    out = capsys.readouterr().out
    assert "b: exit status 3" in out
    assert "c: skipped, absent.beton does not exist" in out
    (state,) = (lease.ROOT / "bench" / "results").glob("*-lease.json")
    assert {name: entry["rc"] for name, entry in json.loads(state.read_text()).items()} == {"a": 0, "b": 3}


def test_an_unknown_item_is_refused(lease, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lease.py", "--only", "nothing"])
    assert lease.main() == 2
    assert "no item begins with nothing" in capsys.readouterr().err
