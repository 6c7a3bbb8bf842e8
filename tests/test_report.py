"""The report: its numbers are those of the log, a browser opens it without an error or a request, and runs that are
damaged, unfinished or maliciously named do no harm."""

import json
import os
import re
import sys
from html import escape
from types import SimpleNamespace

import browser
import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import photo, write_beton

from fastssl import backbones, config, report, views
from fastssl.checkpoint import disk, run_folder
from fastssl.config import Backbone, Data, Optim, Run
from fastssl.methods import simclr
from fastssl.report import charts, run_data, tables

SPEC = Backbone("resnet10", stem="cifar", width=8)
MALICIOUS = """</title><script>window.hacked=1</script>"'><img src=x onerror=window.hacked=1>"""
STEPS, PER_EPOCH = 60, 20


def record(step, loss):
    phases = {
        "data_ms": 1.0,
        "views_ms": 2.0,
        "forward_ms": 30.0,
        "backward_ms": 60.0,
        "optimizer_ms": 5.0,
        "other_ms": 2.0 + 100 * (step == 1),
    }
    total = sum(phases.values())
    return {
        "step": step,
        "epoch": (step - 1) // PER_EPOCH,
        "lr": 0.1,
        "loss": loss,
        "loss_scale": 1.0,
        "applied": True,
        **phases,
        "total_ms": total,
        "images_per_s": 32 / total * 1e3,
        "memory_gib": 0.5,
        "mfu": None,
    }


def lines(steps, knn=True):
    out = []
    for step in range(1, steps + 1):
        out.append(record(step, 5 / step))
        if knn and step % PER_EPOCH == 0:
            out.append({"step": step, "epoch": (step - 1) // PER_EPOCH, "knn_top1": 40.0 + step / 10})
    return [json.dumps(line) for line in out]


def write_run(folder, data, steps=STEPS, *, name="a", temperature=0.5, weights=True, tail=""):
    run = Run(
        method=simclr.Config(temperature=temperature),
        backbone=SPEC,
        name=name,
        optim=Optim(batch=32, epochs=3),
        data=Data(train=data[0], test=data[1], views=views.simclr(16)),
    )
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.dump(run)))
    (folder / "log.jsonl").write_text("\n".join(lines(steps)) + "\n" + tail)
    if weights:
        torch.manual_seed(0)
        temporary = disk.create(folder, steps)
        tensors = {"backbone." + k: v for k, v in backbones.build(SPEC).state_dict().items()}
        safetensors.torch.save_file(tensors, temporary / "weights.safetensors")
        disk.commit(temporary, 1)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    out = []
    for name, n in (("train", 24), ("test", 40)):
        images = [(photo(rng, 20, 20) // 2 + 60 * (i % 3)).astype(np.uint8) for i in range(n)]
        out.append(str(write_beton(folder / f"{name}.beton", images, [i % 3 for i in range(n)])))
    path, classes = folder / "train.beton", ["red", "green", "blue"]
    path.with_suffix(".json").write_text(
        json.dumps(
            {
                "format": 1,
                "samples": 24,
                "max_pixels": 400,
                "bytes": path.stat().st_size,
                "label": "int",
                "min_side": 20,
                "max_height": 20,
                "max_width": 20,
                "classes": classes,
            }
        )
    )
    return out


@pytest.fixture(scope="module")
def page(data, tmp_path_factory):
    """A page of two runs: a finished one with a malicious name, and one that was killed while a line was written,
    without data and weights."""
    folder = tmp_path_factory.mktemp("runs")
    first = write_run(folder / "first", data, name=MALICIOUS)
    second = write_run(
        folder / "second",
        ("gone.beton", "gone.beton"),
        25,
        name="killed",
        temperature=0.1,
        weights=False,
        tail='{"step": 26, "epoch": 1, "lo',
    )
    (first / "environment.json").write_text(json.dumps([{"step": 0, "device": "<b>X100</b>", "torch": "2.11.0"}]))
    (first / "eval").mkdir()
    row = {"k": 20, "top1": 71.25, "selected_on": "test"}
    (first / "eval" / "knn.json").write_text(json.dumps({"protocol": "knn", "options": {}, "results": [row]}))
    out = folder / "page.html"
    argv = [first, second, "--out", out, "--device", "cpu", "--workers", 1]
    assert report.main(list(map(str, argv))) == 0
    return out


def text_of(page):
    return page.read_text()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if browser.find() is None:
        message = "no Chromium: apt-get install chromium-headless-shell, or FASTSSL_BROWSER=/path/to/chrome"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
    with browser.Page(tmp_path_factory.mktemp("profile")) as shown:
        yield shown


def opened(chromium, path):
    chromium.console.clear()
    chromium.requests.clear()
    chromium.open(path.as_uri())
    return chromium


def test_the_page_opens_without_error_or_request(chromium, page, tmp_path):
    shown = opened(chromium, page)
    for scheme, width in (("light", 1280), ("dark", 1280), ("light", 390)):
        shown.size(width, 900)
        shown.media("", scheme)
        overflow = shown.value("document.documentElement.scrollWidth - innerWidth")
        assert overflow <= 0, f"{overflow} pixels wider than the window of {width}"
        shown.screenshot(tmp_path / "shot.png")
        assert len((tmp_path / "shot.png").read_bytes()) > 50_000
    shown.size(1280, 900)
    assert shown.console == []
    assert [url for url in shown.requests if not url.startswith("data:")] == [page.as_uri()]
    assert shown.value("window.hacked") is None and shown.value("document.scripts.length") == 1
    ids = shown.value("[...document.querySelectorAll('section')].map(s => s.id)")
    assert ids == [
        "summary",
        "training",
        "speed",
        "views",
        "nearest-neighbours",
        "embedding-map",
        "evaluations",
        "configuration",
        "environment",
    ]
    assert shown.value("document.querySelector('h1').textContent") == "2 runs"
    assert shown.value("document.querySelector('.card h3').textContent") == MALICIOUS
    assert shown.value("[...document.images].length") == 6 * 7 + 8 * 9
    assert shown.value("[...document.images].every(i => i.complete && i.naturalWidth === 64 && i.alt)")
    assert shown.value("document.querySelectorAll('svg[data-points]').length") == 2  # PCA and t-SNE of the first run


def test_colours_follow_the_system(chromium, page):
    shown = opened(chromium, page)
    seen = {}
    for scheme in ("light", "dark"):
        shown.media("", scheme)
        colours = shown.value("(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))")
        seen[scheme] = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours]
    assert seen["light"][0] > 600 > 200 > seen["light"][1] and seen["dark"][0] < 200 < 600 < seen["dark"][1]
    shown.media("print", "light")
    assert shown.value("getComputedStyle(document.querySelector('.bar nav')).display") == "none"
    shown.media("", "light")


def test_values_under_the_pointer_are_those_of_the_log(chromium, page):
    shown = opened(chromium, page)
    chart = "document.querySelector('svg[data-lines]')"
    shown.value(chart + ".scrollIntoView({block: 'center', behavior: 'instant'})")
    box = shown.value(f"(r => [r.x, r.y, r.width, r.height])({chart}.getBoundingClientRect())")
    shown.hover(box[0] + box[2] - 4, box[1] + box[3] / 2)  # the end of the loss's axis: step 60, epoch 3
    tip = shown.value("[...document.querySelectorAll('#tip div')].map(d => d.textContent)")
    assert tip[0] == "epoch3" and tip[1] == f"{MALICIOUS}{round(5 / 60, 6):.5g}" and tip[2] == "killed0.2"
    assert not shown.value("document.getElementById('tip').hidden")
    shown.hover(2, 2)
    assert shown.value("document.getElementById('tip').hidden")
    assert shown.value("document.getElementById('tip').querySelectorAll('img, script').length") == 0


def test_a_run_can_be_hidden(chromium, page):
    shown = opened(chromium, page)
    drawn = "getComputedStyle(document.querySelector('path.line.r0')).display"
    assert shown.value(drawn) != "none"
    shown.value("document.querySelector('input[data-run=\"0\"]').click()")
    assert shown.value(drawn) == "none"
    assert shown.value("getComputedStyle(document.querySelector('path.line.r1')).display") != "none"


def test_the_browser_would_report_errors_and_requests(chromium, tmp_path):
    """So the checks above can fail."""
    bad = tmp_path / "bad.html"
    bad.write_text("<img src='file:///nowhere.png'><script>console.error('one'); undefined.two</script>")
    shown = opened(chromium, bad)
    console = " ".join(shown.console)
    assert "one" in console and "two" in console and "file:///nowhere.png" in shown.requests


def test_the_page_refers_to_no_other_file_or_host(page):
    text = text_of(page)
    assert set(re.findall(r"""(?:src|href|action)\s*=\s*["']?([a-z]+:|/|#)""", text)) <= {"data:", "#"}
    assert "@import" not in text and not re.findall(r"url\((?!#)", text)
    assert MALICIOUS not in text and escape(MALICIOUS) in text and "<b>X100" not in text


def test_missing_parts_of_a_run_are_explained(page):
    text = text_of(page)
    assert "gone.beton does not exist: start the report in the folder of the training" in text
    assert "there is no complete checkpoint: features need one" in text
    assert "killed: environment.json is absent" in text
    assert "Probe, top-1: no run has logged it; log.probe=True" in text
    assert "MFU of killed: not known; it needs a GPU" in text, "and nothing of the first, which ran on a CPU"
    assert "finished: 60 steps" in text and "at step 25 of 60, last written" in text


def test_the_page_shows_settings_and_evaluations(page):
    text = text_of(page)
    differing = text[text.index("setting that differs") : text.index("<summary>All")]
    gray = '<span class="default" title="the default">0.1</span>'
    row = f'<code>method.temperature</code></th><td class="code r0">0.5</td><td class="code r1">{gray}</td>'
    assert row in differing
    assert "data.train" in differing and "backbone.width" not in differing and "backbone.width" in text
    assert "<b>71.25</b>" in text and "selected on test data" in text and "Constant: loss_scale = 1." in text


def test_the_summary_has_method_network_data_and_baselines(page):
    text = text_of(page)
    first = text[text.index('<article class="card s0') : text.index('<article class="card s1')]
    facts = dict(re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd>", first))
    assert facts["Method"] == "simclr" and facts["Network"] == "resnet10, stem cifar, width 8"
    assert facts["Data"] == "train.beton (24 images, 3 classes)" and facts["Views"] == "2 of 16 x 16 pixels"
    assert facts["Tested on"] == "test.beton" and facts["Length"] == "3 of 3 epochs, 60 steps of 32 images, 6 s"
    assert escape("1 rank, <b>X100</b>") in facts["Machine"]
    bars = dict(re.findall(r"<span>([^<]*)</span><b>([\d.]+) %</b>", first))
    assert set(bars) == {"this network", "the same network, untrained", "pixels", "chance (the largest class)"}
    assert float(bars["chance (the largest class)"]) == 35.0 and float(bars["pixels"]) > 50  # 14 of 40
    assert "Collapsed" not in text


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


@pytest.mark.parametrize(
    "argv, message",
    [
        (["nowhere"], "no run folder nowhere"),
        (["EMPTY"], "is not a run folder: it has neither log.jsonl nor config.json"),
        (["RUN", "RUN"], "named twice"),
        (["RUN", "--points", "3"], "points=3: a map needs 5 or more"),
        (["RUN", "--eval", "RUN/config.json"], "is not a result of fastssl eval"),
        (["RUN", "--eval", "OTHER"], "was computed from 72 tensors from elsewhere/checkpoints/x, which belong to none"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(page, tmp_path, capsys, argv, message):
    (tmp_path / "empty").mkdir()
    other = {"protocol": "knn", "results": [], "of": {"weights": "72 tensors from elsewhere/checkpoints/x"}}
    (tmp_path / "other.json").write_text(json.dumps(other))
    names = {"RUN": page.parent / "first", "EMPTY": tmp_path / "empty", "OTHER": tmp_path / "other.json"}
    argv = [str(names.get(word, word)).replace("RUN/", f"{page.parent}/first/") for word in argv]
    assert report.main([*argv, "--out", str(tmp_path / "out.html")]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not (tmp_path / "out.html").exists()


def test_results_in_other_folders_are_assigned_to_their_run(page, tmp_path):
    first, second = page.parent / "first", page.parent / "second"
    result = {
        "protocol": "linear",
        "results": [{"lr": 1.0, "top1": 55.5}],
        "options": {},
        "of": {"weights": f"72 tensors from {second}/checkpoints/step_00000025/weights.safetensors"},
    }
    (tmp_path / "linear.json").write_text(json.dumps(result))
    argv = [first, second, "--points", 0, "--eval", tmp_path / "linear.json", "--out", tmp_path / "o.html"]
    assert report.main(list(map(str, argv))) == 0
    none, found = "<td class=.r0.><small>none</small></td>", "<td class=.r1.><span [^>]*><small>lr=1</small><b>55.50"
    assert re.search(none + found, (tmp_path / "o.html").read_text())


def test_each_start_of_a_run_is_recorded_and_shown(data, tmp_path):
    folder = write_run(tmp_path / "run", data, 25, weights=False)
    for step in (0, 20):
        run_folder.record_environment(
            SimpleNamespace(folder=folder, device=torch.device("cpu"), step=step, loader=None)
        )
    first, second = json.loads((folder / "environment.json").read_text())
    assert (first["step"], second["step"], second["ranks"]) == (0, 20, 1)
    assert first["torch"] == torch.__version__.split("+")[0]
    assert report.main([str(folder), "--points", "0", "--out", str(tmp_path / "o.html")]) == 0
    text = (tmp_path / "o.html").read_text()
    assert "was started 2 times: step 0" in text and escape(first["device"]) in text
    run_folder.record_environment(
        SimpleNamespace(folder=folder, device=torch.device("cpu"), step=0, loader=None)
    )  # a new run in its place
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
