"""Methods do not change the weights of `backbone.pretrained` after loading, and their teachers are copies of them."""

from dataclasses import replace

import method_cases as cases
import pytest
import torch
from torch import nn

from fastssl import backbones
from fastssl.build import build_method
from fastssl.config import Backbone

NAMES = [name for name in cases.CASES if cases.CASES[name].module in ("", name) or name == "mocov3 vit"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """{name of backbone: (backbone with random values, its weight file)}; no initialisation gives these values."""
    out = {}
    for spec in (cases.PLAIN, cases.VIT):
        torch.manual_seed(1)
        net = backbones.build(spec).eval()
        for value in net.state_dict().values():
            value.normal_(0.01, 0.1)
        file = tmp_path_factory.mktemp(spec.name) / "a.pth"
        torch.save(getattr(net, "body", net).state_dict(), file)
        out[spec.name] = net, str(file)
    return out


def build(name, file, **changes):
    run = cases.run(name)
    run.backbone = replace(run.backbone, pretrained=file, **changes)
    torch.manual_seed(0)
    return build_method(run, cases.Memory(None, run.optim.batch))


@pytest.mark.parametrize("name", NAMES)
def test_features_equal_those_of_the_pretrained_file(name, pretrained):
    net, file = pretrained[cases.CASES[name].backbone.name]
    method = build(name, file).eval()
    copies = [m for m in method.modules() if isinstance(m, type(net))]
    assert len(copies) == 1 + ("target" in dict(method.named_children()))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for copy in copies:
            torch.testing.assert_close(copy(x), net(x), rtol=0, atol=0)
            assert all(torch.equal(v, net.state_dict()[k]) for k, v in copy.state_dict().items())


def test_frozen_parameters_stay_frozen_after_loading(pretrained):
    backbone = build("mocov3 vit", pretrained["test_vit"][1]).backbone
    frozen = {n for n, p in backbone.named_parameters() if not p.requires_grad}
    assert frozen == {"body.pos_embed", "body.patch_embed.proj.weight", "body.patch_embed.proj.bias"}


def test_method_that_overwrites_loaded_weights_raises(pretrained, monkeypatch):
    from fastssl.methods import simclr

    class Overwriting(simclr.SimCLR):
        def __init__(self, config, backbone, *rest):
            super().__init__(config, backbone, *rest)
            nn.init.zeros_(backbone.conv1.weight)

    monkeypatch.setattr(simclr, "SimCLR", Overwriting)
    with pytest.raises(ValueError, match=r"overwrites 1 of the tensors .*conv1.weight.* init_backbone"):
        build("simclr", pretrained["resnet10"][1])
    run = cases.run("simclr")
    assert run.backbone == Backbone("resnet10", stem="cifar", norm="gn", width=8)
    assert build_method(run, cases.Memory(None, 16)).backbone.conv1.weight.abs().max() == 0
