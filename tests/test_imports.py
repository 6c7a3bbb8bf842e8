"""Imports point one way: a module may import ours from the lines above its own in LAYERS, and nothing beside it."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "data_prep", "configs")  # imported as fastssl.kernels, ...
# A package (kernels, data_prep, eval) is one word; inside it modules may import each other.
LAYERS = """
    parsing files launcher host_memory
    kernels data_prep
    config rendezvous
    options
    dist
    decode sampler sharded_table
    zero
    amp gradients norm loader backbones optim log meters clustering ending agreement
    cuda_graph inference
    trainer
    bottleneck checkpoint
    weights
    plan
    doctor params
    contract
    views pictures
    methods.parts
    methods.*
    eval
    hooks report
    step compiled
    build outputs
    memory nonfinite
    engine
    api
    train
    quickstart replay slurm
    __main__
""".splitlines()
CONFIGS_MAY_USE = {"config", "methods.*", "views", "hooks"}
MAY_CONVERT = {"data_prep", "quickstart", "api", "__main__"}  # the trainer never reads sources
KERNELS_MAY_USE = {"torch", "triton", "numpy", "pytest", *sys.stdlib_module_names}  # pytest: in testing.py
SHARED_BY_OPS = {"one_pass", "similarity"}  # folders of kernels/ that are not ops

MODULES = {  # dotted name -> file
    ".".join((package, *file.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__"): file
    for package, folder in [("fastssl", ROOT / "fastssl"), *((f"fastssl.{f}", ROOT / f) for f in FOLDERS)]
    for file in folder.rglob("*.py")
}


def word(name: str) -> str:
    """The word in LAYERS: fastssl.eval.knn -> eval, fastssl.methods.simclr -> methods.*"""
    first, *rest = [*name.split(".")[1:], "__init__"]
    return first if first != "methods" else "methods.parts" if rest[0] == "parts" else "methods.*"


def level(name: str) -> int:
    return next((i for i, line in enumerate(LAYERS) if word(name) in line.split()), -1)


def imports(source: str, package: str) -> set[str]:
    """What source in that package imports, anywhere in it, in full; members of packages that are modules as modules."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            found |= {name if (name := f"{base}.{a.name}") in MODULES else base for a in node.names}
    return found


def imports_of(name: str) -> set[str]:
    file = MODULES[name]
    return imports(file.read_text(), name if file.name == "__init__.py" else name.rpartition(".")[0])


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_one_way(name):
    ours = {i for i in imports_of(name) if i.split(".")[0] == "fastssl"}
    if word(name) == "__init__":
        assert not ours
    elif word(name) == "configs":
        assert {word(i) for i in ours} <= CONFIGS_MAY_USE
    else:
        assert level(name) >= 0, f"{name} has no place in LAYERS of {Path(__file__).name}: give it one"
        beside = set() if word(name) == "methods.*" else {word(name)}
        wrong = {i for i in ours if word(i) not in beside and not 0 <= level(i) < level(name)}
        wrong |= {i for i in ours if word(i) == "data_prep" and word(name) not in MAY_CONVERT}
        assert not wrong, f"{name} imports {sorted(wrong)}, which LAYERS does not put above it"


@pytest.mark.parametrize("name", [m for m in sorted(MODULES) if word(m) == "kernels"])
def test_kernels_need_torch_and_triton_only(name):
    more = {"numba"} if name == "fastssl.kernels.augment.cpu_loops" else set()
    assert {i.split(".")[0] for i in imports_of(name)} <= {"fastssl", *KERNELS_MAY_USE, *more}


@pytest.mark.parametrize("name", [m for m in sorted(MODULES) if m.startswith("fastssl.kernels.")])
def test_an_op_imports_no_other_op(name):
    def folder(module):
        part = f"{module}..".split(".")[2]
        return part if part and (ROOT / "kernels" / part).is_dir() else ""

    folders = {folder(i) for i in imports_of(name) if i.startswith("fastssl.kernels")}
    assert folders <= {"", folder(name), *SHARED_BY_OPS}


def test_no_folder_is_imported_by_its_bare_name():
    """`import kernels` would find the package of that name on PyPI, or nothing, once installed."""
    assert not [(name, i) for name in MODULES for i in imports_of(name) if i.split(".")[0] in FOLDERS]


def test_the_check_sees_every_form_of_import():
    source = "import torch.nn\nfrom . import parts\ndef f():\n from ..config import Run\n from fastssl import dist"
    found = imports(source, "fastssl.methods")
    assert found == {"torch.nn", "fastssl.methods.parts", "fastssl.config", "fastssl.dist"}


def test_the_architecture_page_has_the_rows_of_layers():
    page = (ROOT / "docs/architecture.md").read_text().split("|---|---|\n")[1].split("\n\n")[0]
    cells = [row.split("|")[1] for row in page.splitlines()]
    named = [[name.strip(" `[").split("]")[0] for name in cell.split(",")] for cell in cells]
    layers = [line.replace("methods.*", "methods").split() for line in LAYERS if line.strip()]
    assert named == layers
