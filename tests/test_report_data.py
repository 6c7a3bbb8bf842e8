"""What the report reads from a run folder and makes of it: evaluations, settings, curves, tables and charts."""

import json
import re
import sys
from html import escape

import numpy as np
import pytest
import torch
from bare_trainer import bare_trainer
from report_runs import PER_EPOCH, data_fixture, record, write_run  # noqa: F401

from fastssl import report
from fastssl.checkpoint import run_folder
from fastssl.methods import simclr
from fastssl.report import charts, run_data, tables


def test_a_collapse_is_reported(data, tmp_path):
    folder = write_run(tmp_path / "run", data, 4, weights=False)
    with open(folder / "log.jsonl", "a") as f:
        for step, rank in enumerate([9.0] * 5 + [1.9, 1.8, 1.7], 5):
            f.write(json.dumps({**record(step, 1.0), "embedding_rank": rank, "feature_rank": 30.0}) + "\n")
    assert report.main([str(folder), "--points", "0", "--out", str(tmp_path / "o.html")]) == 0
    assert (
        "<b>Collapsed.</b> The network gives nearly the same for every image: Effective rank of the embeddings 1.8 "
        "(below 2; mean of the last 3 measures)."
    ) in (tmp_path / "o.html").read_text()


def test_evaluations_have_a_row_per_metric_and_mark_the_best(data, tmp_path):
    folders = [write_run(tmp_path / name, data, 4, name=name, weights=False) for name in "ab"]
    for folder, top1 in zip(folders, ((50.0, 61.0), (70.5, 60.0))):
        (folder / "eval").mkdir()
        for features in ("weights", "pixels"):
            rows = [{"k": k, "top1": value, "top5": 99.0} for k, value in zip((10, 20), top1)]
            of = {"features": features, "test": "x/t.beton"}
            result = {"protocol": "knn", "options": {}, "of": of, "results": rows}
            (folder / "eval" / f"knn-{features}.json").write_text(json.dumps(result))
    assert report.main([*map(str, folders), "--points", "0", "--out", str(tmp_path / "o.html")]) == 0
    text = (tmp_path / "o.html").read_text()
    table = text[text.index('id="evaluations"') : text.index('id="configuration"')]
    rows = [re.sub(r"<[^>]*>", " ", row).split() for row in table.split("<tr>")[2:]]
    first = ["knn", "t.beton", "top-1", "%", "k=10", "50.00", "k=20", "61.00", "k=10", "70.50", "k=20", "60.00"]
    assert rows[0] == first and len(rows) == 4 and rows[2][:4] == ["knn", "t.beton", "baseline:", "pixels"]
    assert re.findall(r'<b class="best">([\d.]+)</b>', table.split("<tr>")[2]) == ["70.50"]


def test_defaults_are_gray_and_modules_named_in_a_config_are_not_imported(data, tmp_path):
    first = write_run(tmp_path / "a", data, 4, name="a", weights=False, temperature=simclr.Config().temperature)
    second = write_run(tmp_path / "b", data, 4, name="b", weights=False, temperature=0.07)
    assert report.main([str(first), str(second), "--points", "0", "--out", str(tmp_path / "o.html")]) == 0
    gray = f'<span class="default" title="the default">{simclr.Config().temperature}</span>'
    row = f'<code>method.temperature</code></th><td class="code r0">{gray}</td><td class="code r1">0.07</td>'
    assert row in (tmp_path / "o.html").read_text()
    usual = tables.defaults({"method": {"type": "antigravity.Config"}, "data": {"views": [{}]}})
    assert usual["optim.lr"] == "0.03" and usual["data.views[0].flip"]
    assert not any(key.startswith("method") for key in usual)
    assert "antigravity" not in sys.modules


def test_each_start_of_a_run_is_recorded_and_shown(data, tmp_path):
    folder = write_run(tmp_path / "run", data, 25, weights=False)
    for step in (0, 20):
        run_folder.record_environment(bare_trainer(folder=folder, step=step))
    first, second = json.loads((folder / "environment.json").read_text())
    assert (first["step"], second["step"], second["ranks"]) == (0, 20, 1)
    assert first["torch"] == torch.__version__.split("+")[0]
    assert report.main([str(folder), "--points", "0", "--out", str(tmp_path / "o.html")]) == 0
    text = (tmp_path / "o.html").read_text()
    assert "was started 2 times: step 0" in text and escape(first["device"]) in text
    run_folder.record_environment(bare_trainer(folder=folder))  # a new run in its place
    assert len(json.loads((folder / "environment.json").read_text())) == 1


def test_a_run_without_steps_or_with_damaged_files_is_reported(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text('{"name": "cut')
    out = tmp_path / "o.html"
    assert report.main([str(folder), "--out", str(out)]) == 0
    assert "no step logged yet" in out.read_text() and "config.json cannot be read" in out.read_text()
    complete, cut = '{"step": 1, "epoch": 0, "loss": 2.5}\n', '{"step": 2, "epoch": 0, "loss"'
    (folder / "log.jsonl").write_text(complete + "rubbish\n[1]\n" + cut)
    run = run_data.read(folder)
    assert run.steps == 1 and run.scalars["loss"][1].tolist() == [2.5] and run.total_steps is None
    assert any(note.startswith("2 lines of log.jsonl") for note in run.notes)
    assert report.main([str(folder), "--out", str(out)]) == 0
    assert "No step has been timed yet" in out.read_text()


def test_losses_that_are_not_finite_and_skipped_steps_are_counted(data, tmp_path):
    folder = write_run(tmp_path / "run", data, 4, weights=False)
    with open(folder / "log.jsonl", "a") as f:
        f.write(json.dumps({**record(5, "nan"), "applied": False}) + "\n" + json.dumps(record(6, "inf")) + "\n")
    run = run_data.read(folder)
    assert run.skipped == 1 and run.steps == 6 and run.scalars["loss"][0].tolist() == [1, 2, 3, 4]
    assert "loss was not finite in 2 records, first at step 5" in run.notes


def test_a_damaged_checkpoint_is_reported(data, tmp_path):
    folder = write_run(tmp_path / "run", data, 4)
    next(folder.glob("checkpoints/*/weights.safetensors")).write_bytes(b"short")
    out = tmp_path / "o.html"
    assert report.main([str(folder), "--out", str(out), "--device", "cpu", "--workers", "1"]) == 0
    assert "is damaged" in out.read_text() and "there is no complete checkpoint" in out.read_text()


def test_bins_are_means_of_equal_intervals(tmp_path):
    run = run_data.RunData(tmp_path)
    y = np.random.default_rng(0).random(1000)
    w = np.random.default_rng(1).random(1000)
    run.scalars = {"loss": (np.arange(1, 1001), y), "total_ms": (np.arange(1, 1001), w)}
    x, mean, low, high = run_data.binned(run, "loss", 10)
    parts = y.reshape(10, 100)
    np.testing.assert_allclose(mean, parts.mean(1))
    np.testing.assert_allclose([x[0], low[3], high[3]], [50.5, parts[3].min(), parts[3].max()])
    weighted = run_data.binned(run, "loss", 10, "total_ms")[1]
    np.testing.assert_allclose(weighted, (parts * w.reshape(10, 100)).sum(1) / w.reshape(10, 100).sum(1))


def test_percentages_of_the_step_add_up_to_100(data, tmp_path):
    run = run_data.read(write_run(tmp_path / "run", data, 40, weights=False))
    x, shares = run_data.time_per_phase(run, bins=20)
    np.testing.assert_allclose(shares.sum(1), 100)
    assert len(x) == 20 and x[0] == 1.5
    np.testing.assert_allclose(shares[0], np.array([2, 4, 60, 120, 10, 104, 0]) / 3)  # steps of 200 and 100 ms
    assert run.steps_per_epoch == PER_EPOCH and run.total_steps == 60


def test_the_table_of_times_leaves_out_the_first_steps(tmp_path):
    run = run_data.RunData(tmp_path)
    steps, first = np.arange(1, 21), np.r_[5000.0, np.zeros(19)]  # compilation
    run.scalars = {"views_ms": (steps, 1 + first), "total_ms": (steps, 10 + first)}
    assert "1.0 <small>10 %</small>" in tables.timings([run])
    run.scalars = {key: (x[:3], y[:3]) for key, (x, y) in run.scalars.items()}
    assert "<small>99 %</small>" in tables.timings([run])  # a shorter run has no others


def test_results_without_a_figure_are_not_in_the_table(tmp_path):
    run = run_data.RunData(tmp_path)
    extract = {"protocol": "extract", "results": [{"file": "test", "layer": "last", "rows": 3, "path": "a.npy"}]}
    run.evaluations = [("extract.json", extract)]
    assert "No results" in tables.evaluations([run])
    run.evaluations += [("knn.json", {"protocol": "knn", "results": [{"k": 20, "top1": 50.0}]})]
    assert "50.00" in tables.evaluations([run]) and "extract" not in tables.evaluations([run])


@pytest.mark.parametrize(
    "low, high, expected",
    [(0, 10, [0, 2, 4, 6, 8, 10]), (0.93, 1.0, [0.94, 0.96, 0.98, 1.0]), (-1, 1, [-1, -0.5, 0, 0.5, 1]), (3, 3, [3])],
)
def test_ticks_are_round(low, high, expected):
    assert charts.ticks(low, high) == expected


def test_axis_labels_are_short():
    values = (0, 0.001, 0.5, 12.3456, 1234, 1.5e6, 3e-7)
    assert [charts.label(v) for v in values] == ["0", "0.001", "0.5", "12.3456", "1,234", "1.5e6", "3e-7"]


def test_an_outlier_does_not_stretch_the_axis():
    low, high, cut = charts.limits([np.r_[np.linspace(1, 2, 99), 500.0]])
    assert cut == 500 and high < 4 and low == 0


def test_settings_are_flattened():
    view = {"type": "fastssl.kernels.augment.params.View", "size": 32, "flip": 0.5, "scale": [0.08, 1.0]}
    flat = tables.flatten({"a": {"b": None, "c": [1, 2]}, "views": [view], "e": {}})
    assert flat == {"a.b": "null", "a.c": "[1, 2]", "views[0].size": "32", "views[0].flip": "0.5", "e": "{}"}
