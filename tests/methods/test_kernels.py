"""Methods pass speed.kernels to every op that they call; on CUDA, an op without it would use Triton."""

import importlib
import pkgutil
from dataclasses import replace
from functools import partial

import method_cases as cases
import pytest
import torch
from bare_trainer import bare_trainer

from fastssl import backbones, kernels
from fastssl.outputs import extract_outputs
from fastssl.step import batch_views
from fastssl.trainer import Context

FOLDERS = [
    importlib.import_module(f"fastssl.kernels.{m.name}") for m in pkgutil.iter_modules(kernels.__path__) if m.ispkg
]
OPS = [folder for folder in FOLDERS if hasattr(folder, "choose")]  # the others are shared by the ops
WITHOUT = {
    "simsiam",
    "barlow",
    "vicreg",
    "vicreg wide",
    "supervised",
    "mae",
    "lejepa",
    "rotation",
    "relative_loc",
    "deepcluster pic",
}  # methods whose only op is `augment`


@pytest.fixture
def op_calls(monkeypatch):
    """A list that receives (op, impl) of every call of an op of fastssl.kernels."""
    calls = []
    for op in OPS:

        def choose(impl, x, op=op, original=op.choose):
            calls.append((op.__name__.rpartition(".")[2], impl))
            return original(impl, x)

        monkeypatch.setattr(op, "choose", choose)
    return calls


@pytest.mark.parametrize("name", cases.CASES)
def test_methods_pass_speed_kernels_to_every_op(name, op_calls):
    run, loader = cases.run(name), cases.Memory(None, 12)
    run = replace(run, speed=replace(run.speed, kernels="reference"))
    torch.manual_seed(0)
    context = Context(loader.samples, loader.batch, loader.classes, kernels=run.speed.kernels)
    method = run.method.build(backbones.build(run.backbone), context)
    t = bare_trainer(run, loader, method=method, deepspeed=method)
    if hasattr(method, "before_epoch"):
        method.before_epoch(0, partial(extract_outputs, t))
    batch = next(loader.epoch(0))
    out = method(batch_views(t, batch), batch)
    method.loss(out, batch)
    method.after_step(out, batch, 0.0)
    assert {impl for _, impl in op_calls} == {"reference"}, op_calls
    assert (name in WITHOUT) == ({op for op, _ in op_calls} == {"augment"})


def test_every_method_has_a_case():
    from fastssl import methods

    modules = {module.name for module in pkgutil.iter_modules(methods.__path__)} - {"parts"}
    assert modules == {case.module or name for name, case in cases.CASES.items()}
