"""Functions of kernels/ have type annotations, except those of triton.jit, which ruff cannot tell from the others."""

import ast
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[1] / "kernels"


def missing(source: str) -> list[str]:
    """The arguments without a type and functions without a type of their result; __init__ needs none for it."""
    found = []
    for f in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)):
        if any(ast.unparse(decorator).startswith("triton.jit") for decorator in f.decorator_list):
            continue
        arguments = [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs]
        found += [f"{f.name}: {a.arg}" for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
        found += [f.name] if f.returns is None and f.name != "__init__" else []
    return found


@pytest.mark.parametrize("file", sorted(KERNELS.rglob("*.py")), ids=lambda f: str(f.relative_to(KERNELS)))
def test_functions_have_annotations(file):
    assert missing(file.read_text()) == []


def test_a_missing_annotation_is_found():
    source = "@triton.jit\ndef k(p, N: tl.constexpr): ...\ndef f(x, *, y: int): ...\nclass A:\n def g(self): ...\n"
    assert missing(source) == ["f: x", "f", "g"]
