"""bench/: what its figures mean, at sizes that take seconds."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")


def test_a_verdict_needs_more_than_the_spread(bench):
    from compare import verdict

    assert "B is faster" in verdict([10, 11, 12, 11], [12.1, 13, 14, 13])
    assert "A is faster" in verdict([12.1, 13, 14, 13], [10, 11, 12, 11])
    assert "no difference" in verdict([10, 11, 12, 11], [11.9, 13, 14, 13])  # one block overlaps
    assert "no verdict" in verdict([1, 1, 1], [2, 2, 2])
    assert "2.9 %" in verdict([1, 1, 1, 1], [2, 2, 2, 2])  # 2 / C(8, 4)


def test_sides_of_a_comparison(bench):
    from compare import side

    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    if not head:
        pytest.skip("not a git checkout")
    both = side("HEAD:speed.graph=on,optim.paramwise.x=a:b")
    assert (both.commit, both.settings) == (head, ("speed.graph=on", "optim.paramwise.x=a:b"))
    assert (side(".").commit, side("speed.graph=on").commit, side("HEAD").settings) == (None, None, ())
    with pytest.raises(ValueError, match="'nowhere' is not a commit"):
        side("nowhere")


def test_a_side_imports_its_own_checkout(bench, tmp_path):
    """Kernels and configs included, which an editable installation maps to the checkout that is installed."""
    from compare import packages

    tree = tmp_path / "tree"
    for name in ("fastssl", "kernels", "data_prep", "configs"):
        (tree / name).mkdir(parents=True)
        (tree / name / "__init__.py").write_text("")
    code = "import fastssl, fastssl.kernels, fastssl.configs; print(fastssl.kernels.__path__[0])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path,
                          env={"PYTHONPATH": str(packages(tree, tmp_path / "site"))})  # fmt: skip
    assert Path(done.stdout.strip()).resolve() == tree / "kernels", done.stderr
