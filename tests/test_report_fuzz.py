"""Run folders with arbitrary values: the report writes its page, or an error of one line."""

import copy
import json

import numpy as np
import pytest
from report_runs import lines, write_run

from fastssl import report

ODD = [
    10**400,
    2**63,
    -(2**70),
    1e308,
    -1e308,
    1e-320,
    float("inf"),
    float("nan"),
    -1,
    0,
    True,
    None,
    "",
    "nan",
    "x" * 3000,
    "\ud800",
    "<b>",
    [],
    [1],
    [[]],
    {},
    {"type": 3},
    {"a": {"b": 1}},
    [None, "a", 1e300],
    "1e999",
]
RAW = [
    "",
    "null",
    "[]",
    "3",
    "{",
    "\x00\xff",
    "[" * 3000 + "]" * 3000,
    '{"a":' * 3000,
    "1" * 5000,
    '"' * 3,
    '{"a":' * 500 + "1" + "}" * 500,
]
RESULT = {
    "protocol": "knn",
    "options": {"a": 1},
    "of": {"features": "weights", "test": "t.beton"},
    "results": [{"k": 10, "top1": 50.0, "top5": 60.0}, {"k": 20, "top1": 51.0, "selected_on": "test"}],
}
ENVIRONMENT = [{"step": 0, "time": "t", "ranks": 1, "device": "cpu", "accelerator": "cpu", "torch": "2"}]


def paths(value, at=()):
    yield at
    for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from paths(part, (*at, key))


def damaged(value, rng):
    """A copy with one to three values replaced or left out."""
    value = copy.deepcopy(value)
    for _ in range(rng.integers(1, 4)):
        places = [p for p in paths(value) if p]
        if not places:
            break
        *above, key = places[rng.integers(len(places))]
        holder = value
        for step in above:
            holder = holder[step]
        if rng.random() < 0.2:
            del holder[key]
        else:
            holder[key] = copy.deepcopy(ODD[rng.integers(len(ODD))])
    return value


@pytest.mark.parametrize("part", ["log", "config", "environment", "result"])
def test_damaged_run_folders_give_a_page_or_a_one_line_error(part, tmp_path, capsys):
    rng = np.random.default_rng(sum(map(ord, part)))
    folder = write_run(tmp_path / "run", ("a.beton", "b.beton"), 3, weights=False)
    (folder / "eval").mkdir()
    whole = {"config": json.loads((folder / "config.json").read_text()), "environment": ENVIRONMENT, "result": RESULT}
    files = {
        "config": folder / "config.json",
        "environment": folder / "environment.json",
        "result": folder / "eval" / "knn.json",
    }
    for name, file in files.items():
        file.write_text(json.dumps(whole[name]))
    for case in range(150):
        if part == "log":
            records = [json.loads(line) for line in lines(24, knn=True)]
            text = "\n".join(
                [
                    *(json.dumps(damaged(record, rng)) for record in records[:: 1 + case % 5]),
                    *([RAW[case % len(RAW)]] * (case % 3 == 0)),
                ]
            )
            (folder / "log.jsonl").write_text(text + "\n", errors="surrogatepass")
        else:
            text = RAW[case] if case < len(RAW) else json.dumps(damaged(whole[part], rng))
            files[part].write_text(text, errors="surrogatepass")
        try:
            code = report.main([str(folder), "--points", "0", "--out", str(tmp_path / "o.html")])
        except Exception as error:
            raise AssertionError(f"case {case}: {text[:2000]}") from error
        err = capsys.readouterr().err
        assert (code, err.count("\n")) in ((0, 0), (2, 1)), (case, code, err[:500], text[:2000])
        assert code == 0 or part == "config"
