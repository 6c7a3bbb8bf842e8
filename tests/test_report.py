"""The report: its numbers are those of the log, a browser opens it without an error or a request, and runs that are
damaged, unfinished or maliciously named do no harm."""

import json
import os
import re
from html import escape

import browser
import pytest
from report_runs import data_fixture, write_run  # noqa: F401

from fastssl import report

MALICIOUS = """</title><script>window.hacked=1</script>"'><img src=x onerror=window.hacked=1>"""


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
    assert "Probe, top-1: no run has logged it: set log.probe=True" in text
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
