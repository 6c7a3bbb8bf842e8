"""speed.compile: a compiled forward trains as the plain one, and so does one that cannot be compiled."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "methods"))
import method_cases as cases

from fastssl import build, compiled, config, dist, engine
from fastssl.config import Backbone
from fastssl.step import step
from fastssl.zero import full_state_dict


@pytest.fixture(autouse=True)
def start():
    dist.init("cpu")
    torch._dynamo.reset()


def losses(name, monkeypatch, backend=None, mode="off", *, auto=None, micro=16) -> tuple[list, dict]:
    """Losses of two steps and the state after them, in which the plain forward has batch norm and dropout.

    `backend`: called with the graph and its inputs, instead of inductor; `auto`: the decision of speed.compile=auto."""
    run = cases.run(name, norm=cases.CASES[name].norm, micro=micro)
    if name == "relative_loc":
        run.method = cases.config(name, norm=True, dropout=0.3)
    run.backbone = Backbone("resnet10", stem="cifar", width=8)
    run.speed.compile = mode
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: backend)
    if mode == "auto":
        monkeypatch.setattr(build, "not_compiled", lambda run, device: auto)
    t = cases.build(run)
    torch.manual_seed(7)
    found = []
    for _, micro_batches in engine.batches(t):
        step(t, micro_batches)
        found.append(float(t.scalars["loss"]))
    return found, full_state_dict(t.method)


def assert_equal(a, b) -> None:
    assert a[0] == b[0]
    assert a[1].keys() == b[1].keys() and all(torch.equal(a[1][k], b[1][k]) for k in a[1])


def counting(graphs: list, fail_from: int | None = None):
    def backend(graph, inputs):
        graphs.append(graph)
        if fail_from is not None and len(graphs) > fail_from:
            raise RuntimeError("no space left\non the compiler's disk")
        return graph.forward

    return backend


@pytest.mark.parametrize("name, micro, fail_from", [("simclr", 8, 1), ("relative_loc", 16, 0)])
def test_auto_falls_back_to_the_same_bits(name, micro, fail_from, monkeypatch, capsys):
    """A graph without and one with gradients, of which the second fails; batch norm and dropout."""
    plain, graphs = losses(name, monkeypatch, micro=micro), []
    capsys.readouterr()
    assert_equal(losses(name, monkeypatch, counting(graphs, fail_from), "auto", micro=micro), plain)
    assert len(graphs) == fail_from + 1, "after a failure nothing more is compiled"
    said = "speed.compile=auto: the forward is not compiled: RuntimeError: no space left on the compiler's disk"
    assert capsys.readouterr().out.count(said) == 1


def test_a_backward_that_cannot_be_compiled_falls_back(monkeypatch, capsys):
    """By default it is compiled when it first runs, after the forward."""
    from torch._dynamo.backends.common import aot_autograd

    def broken(graph, inputs):
        raise RuntimeError("not the backward")

    plain = losses("simclr", monkeypatch)
    backend = aot_autograd(fw_compiler=lambda graph, inputs: graph.forward, bw_compiler=broken)
    assert_equal(losses("simclr", monkeypatch, backend, "auto"), plain)
    assert capsys.readouterr().out.count("not compiled: RuntimeError: not the backward") == 1


def test_an_error_of_dynamo_falls_back(monkeypatch):
    """Of functions that nothing else uses: Dynamo never again looks at one that it has failed at."""
    from torch._dynamo.output_graph import OutputGraph

    def broken(*args, **kwargs):
        raise RuntimeError("an error of Dynamo")

    monkeypatch.setattr(OutputGraph, "compile_and_call_fx_graph", broken)
    x = torch.ones(8)
    torch.manual_seed(3)
    want = torch.dropout(x, 0.5, True)
    torch.manual_seed(3)
    assert torch.equal(compiled.compile_forward(lambda x: torch.dropout(x, 0.5, True), required=False)(x), want)
    with pytest.raises(ValueError, match="speed.compile=on: the forward cannot be compiled.*an error of Dynamo"):
        compiled.compile_forward(lambda x: torch.dropout(x, 0.5, True), required=True)(x)


def test_on_refuses_what_cannot_be_compiled(monkeypatch, capsys):
    graphs = []
    with pytest.raises(
        ValueError, match=r"speed.compile=on: .*use speed.compile=off \(RuntimeError: no space"
    ) as error:
        losses("simclr", monkeypatch, counting(graphs, 0), "on")
    assert "\n" not in str(error.value) and len(graphs) == 1
    assert "not compiled" not in capsys.readouterr().out


def test_what_is_compiled(monkeypatch):
    """`auto` is off everywhere until a result on a GPU shows equal losses; "off" compiles nothing."""
    run, cpu, cuda = cases.run("simclr"), torch.device("cpu"), torch.device("cuda")
    assert run.speed.compile == "auto"
    assert "CPU; speed.compile=on" in build.not_compiled(run, cpu)
    assert "on a GPU; speed.compile=on" in build.not_compiled(run, cuda)
    run.speed.zero = 3
    assert "ZeRO 3" in build.not_compiled(run, cuda)
    run.speed.zero, run.speed.compile = 0, "on"
    assert build.not_compiled(run, cpu) is None
    graphs = []
    for mode, used in (("off", False), ("on", True), ("auto", False)):
        losses("simclr", monkeypatch, counting(graphs), mode, auto="a reason")
        assert bool(graphs) is used
        graphs.clear()


@pytest.mark.parametrize("value, meant", [("True", "on"), ("False", "off"), ("true", "on")])
def test_the_old_values_are_refused_with_the_new_ones(value, meant):
    run = cases.run("simclr")
    with pytest.raises(ValueError, match=f"speed.compile=.* is not one of auto, on, off; did you mean '{meant}'"):
        config.set_override(run, f"speed.compile={value}")
    run.speed.compile = value == "True"
    with pytest.raises(ValueError, match="did you mean 'o"):
        config.validate(run)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of distutils, when inductor calls the compiler
def test_inductor_compiles_forward_and_backward():
    """The product's backend itself, on a small network."""
    net = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.GELU())
    fast = compiled.compile_forward(lambda x: {"z": net(x)}, required=True)
    x = torch.randn(5, 6)
    grads = []
    for forward in (lambda x: {"z": net(x)}, fast):
        grads.append(torch.autograd.grad(forward(x)["z"].square().sum(), list(net.parameters())))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)
