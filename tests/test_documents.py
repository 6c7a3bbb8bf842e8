"""The documents name files, targets, commands and numbers that exist, and their Python runs."""

import ast
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from fastssl import config, dist, methods

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text()


def anchor(heading: str) -> str:
    """GitHub's link to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_make_targets_and_files_that_exist(path):
    text = path.read_text()
    targets = set(" ".join(re.findall(r"^([a-z -]+):", (ROOT / "Makefile").read_text(), re.M)).split())
    named = set(re.findall(r"\bmake ([a-z-]+)", " ".join(re.findall(r"`[^`\n]+`|^    .*$", text, re.M))))
    assert named <= targets, named - targets
    links = {link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link}
    for link in links:
        file, _, section = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        if section:
            assert section in {anchor(h) for h in re.findall(r"^#+ (.*)$", target.read_text(), re.M)}, link


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if p.stem != "from_openselfsup"], ids=lambda path: path.name)
def test_documents_name_files_of_the_repository(path):
    files = r"\b(?:bench|configs|data_prep|docs|fastssl|kernels|tests|tools)/[a-z0-9_/.-]+\.(?:py|sh|yaml|md|jsonl)\b"
    missing = {name for name in re.findall(files, path.read_text()) if not (ROOT / name).exists()}
    assert missing <= {"configs/mine/r50.py"}  # an example


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    missing = [path.name for path in (ROOT / "docs").glob("*.md") if f"({path.name})" not in index]
    assert missing == ["README.md"]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_training_commands_load(path):
    """Those that name a config of the repository."""
    text = path.read_text().replace("\\\n", " ")
    for line in re.findall(r"^    .*(?:fastssl train|fastssl/train\.py) (configs/.*)$", text, re.M):
        file, *overrides = [word for word in shlex.split(line, comments=True) if not word.startswith("--")]
        config.load(ROOT / file, [word for word in overrides if "=" in word])


def test_the_config_of_the_training_page_loads(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "train.md").read_text(), re.S)
    file = tmp_path / "configs" / "mine" / "r50.py"
    file.parent.mkdir(parents=True)
    file.write_text(code)
    run = config.load(file, ["optim.lr=0.6"])
    assert (run.name, run.optim.lr, len(run.data.views)) == ("mine/r50", 0.6, 2)


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    dist.shutdown()  # left by earlier tests in this process
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    names: dict = {}
    exec(code, names)
    assert names["features"].shape == (1797, 64) and np.array_equal(names["labels"], names["digits"].target)
    assert (tmp_path / "work_dirs/digits/log.jsonl").exists() and (tmp_path / "loss.png").stat().st_size > 1000


ROWS = re.findall(
    r"^\| \[[^]]+\]\(fastssl/methods/(\w+)\.py\) \| `([^`]+)` \| (.*?) \| (.*?) \| (.*?) \|$", README, re.M
)


def test_the_readme_lists_every_method():
    assert {method for method, *_ in ROWS} == set(methods.names())


@pytest.mark.parametrize("method, path, published, ours, short_run", ROWS, ids=[path for _, path, *_ in ROWS])
def test_the_methods_of_the_readme_have_the_numbers_of_their_sources(method, path, published, ours, short_run):
    doc = " ".join(ast.get_docstring(ast.parse((ROOT / "configs" / path).read_text())).split())
    theirs, _, result = doc.partition("Published: ")[2].partition(" fastssl: ")
    numbers = re.findall(r"\d+\.\d+", published)
    assert all(number in theirs for number in numbers) and (numbers or published == "none")
    assert ours in result, "the config's docstring has our result"
    smoke = (ROOT / "configs" / "smoke" / f"{method}.py").read_text()  # equal to docs/results.md: test_configs.py
    assert short_run == "not measured yet" or f"kNN (k=20) {short_run} %" in smoke
