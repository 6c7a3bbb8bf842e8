"""No method changes the backbone after `backbone.pretrained` is loaded; its teachers are copies of what was loaded."""

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
    """Per backbone: one with values that no initialisation gives, and its file."""
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


def start(name, file, **changes):
    run = cases.run(name)
    run.backbone = replace(run.backbone, pretrained=file, **changes)
    torch.manual_seed(0)
    return build_method(run, cases.Memory(None, run.optim.batch))


@pytest.mark.parametrize("name", NAMES)
def test_features_are_those_of_the_file(name, pretrained):
    net, file = pretrained[cases.CASES[name].backbone.name]
    method = start(name, file).eval()
    copies = [m for m in method.modules() if isinstance(m, type(net))]
    assert len(copies) == 1 + ("target" in dict(method.named_children()))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for copy in copies:
            torch.testing.assert_close(copy(x), net(x), rtol=0, atol=0)
            assert all(torch.equal(v, net.state_dict()[k]) for k, v in copy.state_dict().items())


def test_what_a_method_freezes_stays_frozen(pretrained):
    backbone = start("mocov3 vit", pretrained["test_vit"][1]).backbone
    frozen = {n for n, p in backbone.named_parameters() if not p.requires_grad}
    assert frozen == {"body.pos_embed", "body.patch_embed.proj.weight", "body.patch_embed.proj.bias"}


def test_a_method_that_overwrites_what_was_loaded_is_refused(pretrained, monkeypatch):
    from fastssl.methods import simclr

    class Careless(simclr.SimCLR):
        def __init__(self, config, backbone, *rest):
            super().__init__(config, backbone, *rest)
            nn.init.zeros_(backbone.conv1.weight)

    monkeypatch.setattr(simclr, "SimCLR", Careless)
    with pytest.raises(ValueError, match=r"overwrites 1 of the tensors .*conv1.weight.* init_backbone"):
        start("simclr", pretrained["resnet10"][1])
    run = cases.run("simclr")
    assert run.backbone == Backbone("resnet10", stem="cifar", norm="gn", width=8)
    assert build_method(run, cases.Memory(None, 16)).backbone.conv1.weight.abs().max() == 0
