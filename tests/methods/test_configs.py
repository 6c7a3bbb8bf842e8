"""Every config loads and matches its path, its docstring and its method; every method has configs."""

import ast
import importlib
import re
from dataclasses import replace
from pathlib import Path

import method_cases as cases
import pytest
import torch

from fastssl import backbones, config, dist, methods, optim
from fastssl.build import check_views
from fastssl.loader import Batch
from fastssl.trainer import Context

pytestmark = pytest.mark.filterwarnings("ignore:method.shuffle=True has no effect on one GPU:UserWarning")

ROOT = Path(__file__).parents[2]
FILES = sorted(p for p in (ROOT / "configs").rglob("*.py") if p.name != "__init__.py")
SMOKE = [p for p in FILES if p.parent.name == "smoke"]
RECIPES = [p for p in FILES if p.parent.name not in ("smoke", "configs")]


def test_smoke_configs_have_the_numbers_of_docs_results():
    """docs/results.md has the measurements."""
    rows = re.findall(
        r"^\| (\w+)(?: \(the teacher\))? \|.*\| ([\d.]+) \| \*\*([\d.]+)\*\* \|",
        (ROOT / "docs" / "results.md").read_text(),
        re.M,
    )
    assert {name for name, *_ in rows} == set(methods.names())
    for name, untrained, trained in rows:
        result = f"kNN (k=20) {trained} %, the untrained network {untrained} %"
        assert result in (ROOT / "configs" / "smoke" / f"{name}.py").read_text(), f"{name}: {result}"


def docstring(path):
    return ast.get_docstring(ast.parse(path.read_text()))


def published(path):
    """The text after "Published:" in a config's docstring, up to our own result ("fastssl:")."""
    found = re.search(r"^Published: (.*?)(?=^fastssl: )", docstring(path), re.S | re.M)
    return " ".join(found[1].split()) if found else None


def recipe_rows():
    """The tables of docs/recipes.md: {config below configs/: its other cells}."""
    text = (ROOT / "docs" / "recipes.md").read_text()
    rows = re.findall(r"^\| `([\w/.-]+\.(?:py|yaml))` \| (.*) \|$", text, re.M)
    assert len(rows) == len(dict(rows)), "a config has two rows"
    return {config: cells.split(" | ") for config, cells in rows}


def test_every_config_has_a_row_in_docs_recipes():
    configs = {name(p) for p in (*FILES, *(ROOT / "configs" / "detection").glob("*.yaml"))}
    assert recipe_rows().keys() == configs
    assert all(all(cell.strip() for cell in cells) for cells in recipe_rows().values())


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: name(p))
def test_config_docstrings_have_the_published_result_and_ours(path):
    """A published number with its source, or "none", with the same text in docs/recipes.md; then our result."""
    text = published(path)
    assert text, "no line that begins with Published:, followed by one that begins with fastssl:"
    sources = "README|PRETRAIN|MODEL_ZOO|model zoo|paper|issue"
    assert text.startswith("none") or re.search(rf"\d\d\.\d+ [^()]*\([^()]*({sources})", text), text
    assert recipe_rows()[name(path)][1] == text
    ours = docstring(path).rpartition("\nfastssl: ")[2]
    assert "not measured yet" in " ".join(ours.split()) or re.search(
        r"\d\d\.\d .*torch \d.*\d{4}-\d\d-\d\d", ours, re.S
    )


def test_no_two_configs_differ_only_in_precision():
    """One config is enough: `optim.precision=fp16` on the command line gives the other."""
    found = {}
    for path in RECIPES:
        run = config.load(path)
        settings = replace(run, name="", optim=replace(run.optim, precision="fp32"))
        found.setdefault(repr(settings), []).append(name(path))
    assert [paths for paths in found.values() if len(paths) > 1] == []


def name(path):
    return str(path.relative_to(ROOT / "configs"))


def build(run, batch=None, samples=1_281_167):
    backbone = backbones.build(run.backbone, run.method)
    classes = [str(i) for i in range(10)]
    return run.method.build(backbone, Context(samples, batch or run.optim.batch, classes, kernels=run.speed.kernels))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_config_matches_its_path_and_method(path):
    run = config.load(path)
    doc = docstring(path)
    assert re.search(r"^fastssl: ", doc, re.M), 'the docstring gives our result, or "fastssl: not measured yet."'
    if path in RECIPES:
        assert type(run.method).__module__ == f"fastssl.methods.{path.parent.name}"
        assert f"fastssl/train.py configs/{name(path)}" in doc
        assert f"{run.optim.epochs}ep" in path.stem
        if "in1k" in path.stem:
            half = path.stem.rpartition("_")[2]
            assert (half if half in ("fp16", "bf16") else "fp32") == run.optim.precision
    with torch.device("meta"):
        method = build(run)
    check_views(method, run.data.views)
    optim.Schedule(method.named_parameters(), run.optim, steps_per_epoch=5004)  # every pattern matches a parameter
    if run.speed.micro_batch:
        assert run.optim.batch % (8 * run.speed.micro_batch) == 0, "eight GPUs share the batch"


@pytest.mark.parametrize("path", SMOKE, ids=name)
def test_smoke_config_makes_a_step(path):
    run = config.load(path)
    torch.manual_seed(0)
    method, n = build(run, batch=8, samples=50_000), 8
    views = [torch.randn(n, 3, v.size, v.size) for v in run.data.views]
    batch = Batch(None, None, torch.arange(n), torch.arange(n) % 3, 0, 0)
    out = method(views, batch)
    assert all(len(v) == n for v in out.values()), "one row per sample"
    assert out["features"].shape == (n, method.backbone.dim) and not out["features"].requires_grad
    loss = method.loss(out, batch)["loss"]
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters() if p.requires_grad)
    method.after_step({k: v.detach() for k, v in out.items()}, batch, 0.5)


@pytest.mark.parametrize("method", methods.names())
def test_every_method_has_configs_and_a_paper(method):
    stems = [p.stem for p in (ROOT / "configs" / method).glob("*.py")]
    assert any("cifar10_200ep" in s for s in stems) and any("in1k" in s for s in stems), stems
    assert (ROOT / "configs" / "smoke" / f"{method}.py").exists()
    doc = importlib.import_module(f"fastssl.methods.{method}").__doc__
    assert "https://arxiv.org/abs/" in doc or method == "supervised"


def test_methods_command_lists_every_method_once(capsys):
    families = [name for members in methods.FAMILIES.values() for name in members.split()]
    assert sorted(families) == methods.names()
    assert methods.main([]) == 0
    listed = capsys.readouterr().out
    assert listed.count("paper    https://arxiv.org/abs/") == len(families) - 1  # "supervised" has none
    assert all(
        name(path) in listed.replace("\n", " ")
        for path in FILES
        if path.name != "quickstart.py" and path.stem != "simclr_cifar10"
    )
    assert "state    target, pointers, queue" in listed  # MoCo's


@pytest.mark.parametrize("what", [{"frozen": 1}, {"norm": "frozen"}])
def test_frozen_parts_without_pretrained_weights_raise(what):
    dist.init("cpu")
    run = cases.run("simclr")
    run.backbone = replace(run.backbone, **what)
    with pytest.raises(ValueError, match="keep pretrained weights as they are: give backbone.pretrained"):
        cases.build(run)
