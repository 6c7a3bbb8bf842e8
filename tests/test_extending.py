"""docs/extending.md: its files run as they stand, and its method is exact on two ranks."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import ranks

from fastssl.__main__ import main

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "extending.md").read_text()
FILES = dict(re.findall(r"```python\n# (exp/\w+\.py)\n(.*?)```", TEXT, re.S))
ENV = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The page's files, its data, and its config trained by the page's own commands."""
    path = tmp_path_factory.mktemp("own")
    (path / "exp").mkdir()
    for name, code in FILES.items():
        (path / name).write_text(code)
    for line in re.findall(r"^    ((?:python|fastssl) .*)$", TEXT, re.M):
        command = (
            [sys.executable, *line.split()[1:]] if line.startswith("python") else [sys.executable, "-m", *line.split()]
        )
        done = subprocess.run(command, cwd=path, env=ENV, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return path


def test_every_block_of_the_page_is_a_file():
    assert list(FILES) == [f"exp/{name}.py" for name in ("align", "net", "watch", "make_data", "recipe", "mine")]
    assert TEXT.count("```python") == len(FILES)


def test_the_page_trains_with_its_method_hook_source_and_views(folder):
    run = folder / "work_dirs" / "mine"
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    steps = [r for r in records if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 9)) and all("align" in r and "uniform" in r for r in steps)
    assert [r["step"] for r in steps if "feature_norm" in r] == [2, 4, 6, 8]
    assert sum("feature_norm_largest" in r for r in records) == 2
    config = json.loads((run / "config.json").read_text())
    assert config["method"] == {"type": "align.Config", "dim": 32, "t": 1.0, "weight": 1.0}
    names = [e["type"].rpartition(".")[2] for e in config["data"]["views"][0]["extra"]]
    assert names == ["Lighting", "Erase", "RandAugment", "Fade", "Transform"]
    assert "ElasticTransform" in config["data"]["views"][0]["extra"][4]["fn"]
    assert config["data"]["views"][1]["blur"] == 0
    again = subprocess.run(
        [sys.executable, "-m", "fastssl", "train", "exp/mine.py", "method.t=1.0", "data.views.all.blur=0", "--resume"],
        cwd=folder,
        env=ENV,
        capture_output=True,
        text=True,
    )
    assert again.returncode == 0 and "continuing" in again.stdout, again.stderr  # the same config in another process


def test_a_run_with_its_method_and_backbone_is_evaluated_and_exported(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    run = "work_dirs/mine"
    monkeypatch.setattr(sys, "path", [*sys.path])  # --import adds to it
    (result,) = Path(run).glob("eval/knn*.json")  # written by the page's last command
    assert json.loads(result.read_text())["results"]
    assert main(["publish", run]) == 0
    assert main(["export", run]) == 2
    assert "unknown backbone 'plain'" in (error := capsys.readouterr().err) and "fastssl --import FILE" in error
    assert main(["--import", "exp/net.py", "export", run]) == 0
    assert main(["report", run, "--points", "20", "--out", str(tmp_path / "o.html")]) == 0  # it is registered now
    assert "align.Config" in (page := (tmp_path / "o.html").read_text()) and "the same network, untrained" in page


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--import"], "--import needs a Python file and a command"),
        (["--import", "nowhere.py", "methods"], "nowhere.py: FileNotFoundError"),
        (["--import", "BROKEN", "methods"], "broken.py, line 1: ZeroDivisionError"),
    ],
)
def test_a_file_that_cannot_be_imported_is_one_line(tmp_path, capsys, argv, message):
    (tmp_path / "broken.py").write_text("1 / 0\n")
    assert main([str(tmp_path / "broken.py") if word == "BROKEN" else word for word in argv]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_the_recipes_of_the_page_can_be_built(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder / "exp")
    import recipe

    assert recipe.no_blur[0].blur == 0 and recipe.no_blur[0].order[:2] == ("gray", "jitter")
    assert [v.size for v in recipe.mixed] == [224, 96]
    sys.modules.pop("recipe")


def worker(out: str, exp: str) -> None:
    """Loss and gradients of the page's method on this rank's share of one batch, averaged over ranks; and those of
    the mistake that the page warns of."""
    sys.path.insert(0, exp)
    import align

    from fastssl import dist
    from fastssl.trainer import Context

    dist.init("cpu")
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5), torch.nn.Tanh()).double()
    backbone.dim = 5
    method = align.Config(dim=4).build(backbone, Context(8, 8)).double()
    views = [x[dist.shard(8)] for x in torch.randn(2, 8, 3, 2, 2, dtype=torch.float64)]
    result = {}
    for name in ("global", "local"):
        if name == "local":
            align.dist.gather = align.dist.mean = lambda x: x
        method.zero_grad()
        loss = method.loss(method(views, None), None)["loss"]
        loss.backward()
        grads = [dist.sum_(p.grad.clone()) / dist.world() for p in method.parameters()]
        result[name] = [dist.sum_(loss.detach().clone()) / dist.world(), *grads]
    if dist.is_main():
        torch.save(result, out)
    dist.shutdown()


def test_the_method_is_exact_on_two_ranks_and_the_mistake_is_not(tmp_path):
    (tmp_path / "align.py").write_text(FILES["exp/align.py"])
    one, two = (ranks.launch(__file__, world, tmp_path / f"{world}.pt", str(tmp_path)) for world in (1, 2))
    for a, b in zip(one["global"], two["global"]):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert all(torch.equal(a, b) for a, b in zip(one["global"], one["local"]))  # on one rank nothing differs
    assert abs(two["local"][0] - two["global"][0]) > 1e-3
    assert max((a - b).abs().max() / a.abs().max() for a, b in zip(two["global"][1:], two["local"][1:])) > 0.05


if __name__ == "__main__":
    ranks.main(worker)
