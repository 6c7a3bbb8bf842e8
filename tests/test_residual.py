"""optim.residual_in_fp32=False: the residual stream of vision transformers in the dtype of autocast."""

import contextlib
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent / "methods"))
import method_cases as cases
from timm.models import vision_transformer as vit

from fastssl import backbones, dist, engine
from fastssl.amp import autocast
from fastssl.backbones import residual
from fastssl.checkpoint import disk

CPU = torch.device("cpu")
DEPTH, DIM = 6, 32


def network(block=vit.Block, low=True, **options) -> nn.Module:
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": DIM, "depth": DEPTH, "num_heads": 2, "num_classes": 0}
    net = vit.VisionTransformer(**shape, block_fn=block, **options)
    if low:
        backbones.use_autocast_dtype_(net, "this")
    return net


def images(**options) -> torch.Tensor:
    return torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(**options)


@contextlib.contextmanager
def cuda_autocast():
    """torch.autocast("cuda", torch.bfloat16) where there is no GPU: the class refuses, the dispatcher does not."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)


@contextlib.contextmanager
def on_a_fake_gpu(net: nn.Module):
    """`net` with parameters that have shapes, a dtype and the device cuda, but no values; gives such images."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        for module in net.modules():
            for name, p in module.named_parameters(recurse=False):
                module._parameters[name] = nn.Parameter(torch.empty(p.shape, device="cuda"))
        yield torch.empty(16, 3, 32, 32, device="cuda")


def stream(net: nn.Module) -> list:
    """Dtypes of the tensors that the network adds to the stream, or adds them to: filled when it is called."""
    found = []

    class Adds(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.Tensor.add and out.ndim == 3 and out.shape[-1] == DIM:
                found.append((*(a.dtype for a in args), out.dtype))
            return out

    forwards = [block.forward for block in net.blocks]
    for block, forward in zip(net.blocks, forwards):

        def counted(x, *args, forward=forward, **kwargs):
            with Adds():
                return forward(x, *args, **kwargs)

        block.forward = counted
    return found


BLOCKS = [(name, options) for name in residual.BLOCKS for options in ({}, {"init_values": 0.1, "drop_path_rate": 0.1})]


@pytest.mark.parametrize("name, options", BLOCKS)
def test_every_sum_of_the_stream_is_in_the_low_dtype(name, options):
    """Of every kind of block, with LayerScale (whose scales are float32) and with DropPath; on a GPU, where autocast's
    norms give float32, and on a CPU."""
    low = torch.bfloat16
    for fake in (False, True):
        net = network(getattr(vit, name), **options)
        adds = stream(net)
        with contextlib.ExitStack() as at_exit:
            x = at_exit.enter_context(on_a_fake_gpu(net)) if fake else images()
            at_exit.enter_context(cuda_autocast() if fake else autocast(CPU, "bf16"))
            net(x)
        assert len(adds) >= DEPTH and set(adds) == {(low, low, low)}, (fake, set(adds))


def test_by_default_and_without_autocast_nothing_is_cast():
    for low, precision, dtype in ((False, "bf16", torch.float32), (True, "fp32", torch.float32)):
        net = network(low=low)
        adds = stream(net)
        with autocast(CPU, precision):
            net(images())
        assert {out for *_, out in adds} == {dtype}
    plain, cast = network(low=False), network()
    assert torch.equal(plain(images()), cast(images())) and plain.state_dict().keys() == cast.state_dict().keys()


def gradients(net: nn.Module, x: torch.Tensor, precision: str = "fp32") -> list[torch.Tensor]:
    with autocast(CPU, precision):
        out = net(x)
    target = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return torch.autograd.grad((out * target).sum(), list(net.parameters()))


def error(found: list, truth: list) -> float:
    """Of all gradients together, relative."""
    return float(sum((f.double() - t).square().sum() for f, t in zip(found, truth)) ** 0.5) / float(
        sum(t.square().sum() for t in truth) ** 0.5
    )


def test_gradients_are_as_exact_as_the_dtype_allows():
    """A stream that is rounded 2 DEPTH + 1 times, in the forward and in the backward, by at most 2^-9 each, adds at
    most the sum of the roundings to the error of the float32 stream, whose branches are in 16 bits as well."""
    truth = gradients(network(low=False).double(), images(dtype=torch.float64))
    high = error(gradients(network(low=False), images(), "bf16"), truth)
    low = error(gradients(network(), images(), "bf16"), truth)
    assert 2**-9 < high < low < high + 2 * (2 * DEPTH + 1) * 2**-9, (high, low)


def test_less_is_kept_for_the_backward():
    """The inputs of the norms are half as wide (on a CPU; on a GPU if the forward is compiled, docs/performance.md)."""
    kept = {}
    for low in (False, True):
        net, found = network(low=low), {}

        def pack(x, found=found):
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), autocast(CPU, "bf16"):
            out = net(images())
        weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
        kept[low] = sum(size for place, size in found.items() if place not in weights)
        del out
    tokens = 16 * (1 + 4 * 4)
    assert kept[False] - kept[True] >= 2 * DEPTH * tokens * DIM * 2, kept


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"precision": "fp32"}, "residual_in_fp32=False has no effect with optim.precision='fp32', only with 'bf16'"),
        (
            {"precision": "bf16"},
            "optim.residual_in_fp32=False: 'resnet10' is not a vision transformer.*such as 'vit_small",
        ),
    ],
)
def test_settings_that_have_no_stream_are_refused(settings, message):
    dist.init("cpu")
    run = cases.run("simclr")
    run.optim.residual_in_fp32 = False
    for name, value in settings.items():
        setattr(run.optim, name, value)
    with pytest.raises(ValueError, match=message) as error:
        cases.build(run)
    assert "\n" not in str(error.value)


def test_a_run_resumes_with_it(tmp_path, monkeypatch):
    """Bit for bit; a resume with another value is refused.  The teacher's stream is cast, too."""
    dist.init("cpu")
    monkeypatch.setattr(engine, "emulated", lambda precision, device: False)

    run = cases.run("mocov3 vit", norm=True, steps=3)
    run.name, run.log.root, run.log.checkpoint_steps, run.deterministic = "run", str(tmp_path), 2, True
    run.optim.precision, run.optim.residual_in_fp32 = "bf16", False
    found = []
    for resume in (False, True):
        t = engine.fit(run, hooks=[], resume=resume, device="cpu", loader=cases.loader(run))
        found.append({k: v.clone() for k, v in t.method.state_dict().items()})
        shutil.rmtree(disk.newest(t.folder))
    assert all(torch.equal(a, b) for a, b in zip(found[0].values(), found[1].values()))
    blocks = [m for m in t.method.modules() if isinstance(m, vit.Block)]
    assert len(blocks) == 2 * len(t.method.backbone.body.blocks) and all(m._forward_pre_hooks for m in blocks)
    run.optim.residual_in_fp32 = True
    with pytest.raises(ValueError, match="optim.residual_in_fp32 was False"):
        engine.fit(run, hooks=[], resume=True, device="cpu", loader=cases.loader(run))
