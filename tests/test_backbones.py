"""Backbones against torchvision (keys, outputs, gradients, initialisation); the OHWI convolution against nn.Conv2d."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from fastssl import backbones, weights
from fastssl.config import Backbone

TORCHVISION = [n for n in backbones.RESNETS if n != "resnet10"]


def build(name="resnet18", **options):
    torch.manual_seed(0)
    return backbones.build(Backbone(name=name, **options))


def shapes(module):
    return {k: tuple(v.shape) for k, v in module.state_dict().items()}


@pytest.mark.parametrize("name", TORCHVISION)
def test_keys_and_shapes_are_torchvisions(name):
    with torch.device("meta"):
        ours, theirs = build(name), getattr(torchvision.models, name)()
    wanted = {k: v for k, v in shapes(theirs).items() if not k.startswith("fc.")}
    assert shapes(ours) == wanted and list(shapes(ours)) == list(wanted)
    assert ours.dim == theirs.fc.in_features


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_outputs_and_gradients_are_torchvisions(name):
    ours, theirs = build(name).double(), getattr(torchvision.models, name)().double()
    theirs.fc = nn.Identity()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 48, 40, dtype=torch.double)
    for m in (ours, theirs):
        m(x).square().sum().backward()
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-12)
    for (k, a), b in zip(ours.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9, msg=k)


@pytest.mark.parametrize("zero_init_residual", [False, True])
def test_initialisation_is_torchvisions(zero_init_residual):
    ours = build(zero_init_residual=zero_init_residual)
    theirs = torchvision.models.resnet18(zero_init_residual=zero_init_residual)
    for k, b in theirs.state_dict().items():
        if k.startswith("fc.") or not b.is_floating_point():
            continue
        a = ours.state_dict()[k]
        if b.ndim == 4:
            fan_out = b.shape[0] * b.shape[2] * b.shape[3]
            assert abs(a.std() / (2 / fan_out) ** 0.5 - 1) < 0.05 and abs(a.mean()) < 5 * a.std() / a.numel() ** 0.5, k
        else:
            assert torch.equal(a, b), k


@pytest.mark.parametrize("name", ["resnet10", "resnet18", "resnet50"])
@pytest.mark.parametrize("stem, first", [("imagenet", 16), ("cifar", 32), ("cifar_pad2", 34)])
@pytest.mark.parametrize("width", [16, 64])
def test_forward_stages_gives_five_maps_of_the_declared_channels(name, stem, first, width):
    net = build(name, stem=stem, width=width).eval()
    x = torch.randn(1, 3, 32, 32)
    maps = net.forward_stages(x)
    assert [m.shape[1] for m in maps] == list(net.stages) and len(maps) == 5
    sides = [first, *((8, 4, 2, 1) if stem == "imagenet" else [-(-first // 2**i) for i in range(4)])]
    assert [m.shape[2] for m in maps] == sides
    assert all(m.min() >= 0 for m in maps), "every map is taken after its ReLU"
    torch.testing.assert_close(net(x), maps[-1].mean((2, 3)))
    assert net(x).shape == (1, net.dim) and net.dim == net.stages[-1]


def test_group_norm_does_not_mix_samples():
    net = build("resnet18", width=16, norm="gn", stem="cifar")
    norms = [m for m in net.modules() if isinstance(m, nn.GroupNorm)]
    assert norms and not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    assert all(m.num_groups <= 32 and m.num_channels // m.num_groups >= 2 for m in norms)
    assert {m.num_channels: m.num_groups for m in norms} == {16: 8, 32: 16, 64: 32, 128: 32}
    x = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(net(x)[:1], net(x[:1]))


def test_in_channels_sets_the_channels_of_the_input():
    assert build("resnet10", in_channels=1, width=8)(torch.randn(2, 1, 16, 16)).shape == (2, 64)


def test_frozen_stages_keep_weights_and_statistics():
    net = build("resnet10", width=8, frozen=2)
    net.eval().train()
    before = copy.deepcopy(net.state_dict())
    net(torch.randn(4, 3, 32, 32)).square().sum().backward()
    torch.optim.SGD([p for p in net.parameters() if p.grad is not None], lr=0.1).step()
    moved = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert {k.split(".")[0] for k in moved} == {"layer2", "layer3", "layer4"}
    assert any("running_mean" in k for k in moved) and any("conv1.weight" in k for k in moved)


def test_frozen_batch_norm_is_that_of_the_checkpoint(tmp_path):
    bn, frozen = build("resnet10", width=8), build("resnet10", width=8, norm="frozen")
    for m in bn.modules():
        if isinstance(m, nn.BatchNorm2d):
            for tensor in (m.weight.data, m.bias.data, m.running_mean, m.running_var):
                tensor.uniform_(0.5, 1.5)
    torch.save(bn.state_dict(), tmp_path / "bn.pth")
    weights.load_backbone(tmp_path / "bn.pth", frozen)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(frozen.train()(x), bn.eval()(x))
    assert not any("bn" in name or "downsample.1" in name for name, _ in frozen.named_parameters())


@pytest.mark.parametrize(
    "options, text",
    [
        ({"name": "resnet81"}, "did you mean 'resnet18'"),
        ({"name": "vit_smal_patch16_224"}, "did you mean 'vit_small_patch16_224'"),
        ({"stem": "cifra"}, "backbone.stem='cifra'"),
        ({"norm": "ln"}, "backbone.norm='ln'"),
        ({"frozen": 5}, "backbone.frozen=5 must be 0 to 4, the number of stages to freeze"),
        ({"name": "vit_tiny_patch16_224", "frozen": 1}, "backbone.frozen=1 does not apply"),
        ({"width": 0}, "backbone.width=0"),
        ({"name": "wide_resnet50_2", "width": 32}, "backbone.width=32"),
        ({"name": "vit_tiny_patch16_224", "stem": "cifar"}, "backbone.stem='cifar' does not apply"),
    ],
)
def test_wrong_settings_of_a_backbone_raise(options, text):
    with pytest.raises(ValueError, match=text):
        build(**options)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto", "timm/resnet18", "mobilenetv3_small_050"])
def test_timm_models_give_features_of_dim(name):
    import timm

    net = build(name).eval()
    x = torch.randn(1, 3, 64, 64)
    assert net(x).shape == (1, net.dim)
    assert [m.shape[1] for m in net.forward_stages(x)] == list(net.stages)
    with torch.device("meta"):
        theirs = timm.create_model(name.removeprefix("timm/"), num_classes=0)
    assert set(net.body.state_dict()) == set(theirs.state_dict()), "keys stay timm's"


CONVS = [
    {"in_channels": 3, "out_channels": 8, "kernel_size": 7, "stride": 2, "padding": 3, "bias": False},
    {"in_channels": 8, "out_channels": 16, "kernel_size": 1},
    {"in_channels": 8, "out_channels": 8, "kernel_size": 3, "padding": 1, "groups": 8},
    {"in_channels": 8, "out_channels": 12, "kernel_size": 3, "padding": 1, "groups": 4, "dilation": 2},
    {"in_channels": 4, "out_channels": 4, "kernel_size": (3, 5), "padding": "same", "padding_mode": "reflect"},
]


@pytest.mark.parametrize("options", CONVS, ids=lambda o: f"{o['kernel_size']}x{o.get('groups', 1)}")
@pytest.mark.parametrize("dtype", [torch.double, torch.float])
def test_channels_last_convolution_equals_nn_conv2d(options, dtype):
    torch.manual_seed(0)
    plain = nn.Conv2d(**options).to(dtype)
    ours = backbones.channels_last_(copy.deepcopy(plain))
    assert type(ours) is backbones.Conv2d and ours.weight.is_contiguous()
    x = torch.randn(3, options["in_channels"], 11, 9, dtype=dtype)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [m(i) for m, i in zip((plain, ours), inputs)]
    seed = torch.randn_like(outputs[0])
    for y in outputs:
        (y * seed).sum().backward()
    near = {"rtol": 0, "atol": 1e-12} if dtype == torch.double else {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(outputs[1], outputs[0], **near)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, **near)
    torch.testing.assert_close(ours.weight.grad.permute(0, 3, 1, 2), plain.weight.grad, **near)
    if plain.bias is not None:
        torch.testing.assert_close(ours.bias.grad, plain.bias.grad, **near)


def test_channels_last_convolution_has_the_usual_state_dict():
    plain = build("resnet18", width=8, stem="cifar")
    ours = backbones.channels_last_(copy.deepcopy(plain))
    assert [k for k, _ in ours.named_parameters()] == [k for k, _ in plain.named_parameters()]
    assert all(p.is_contiguous() for p in ours.parameters())
    state = ours.state_dict()
    assert list(state) == list(plain.state_dict())
    assert all(torch.equal(state[k], v) for k, v in plain.state_dict().items())

    for assign in (False, True):
        other = backbones.channels_last_(build("resnet18", width=8, stem="cifar").apply(_scramble))
        result = other.load_state_dict(state, strict=True, assign=assign)
        assert not result.missing_keys and not result.unexpected_keys
        assert all(torch.equal(a, b) for a, b in zip(other.parameters(), ours.parameters()))
        assert all(p.is_contiguous() for p in other.parameters())
    assert state["conv1.weight"].shape == (8, 3, 3, 3), "loading leaves the caller's dictionary alone"

    with pytest.raises(RuntimeError, match="Missing key"):
        ours.load_state_dict({k: v for k, v in state.items() if k != "layer1.0.conv1.weight"})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        ours.load_state_dict({**state, "layer1.0.conv9.weight": state["conv1.weight"]})


def _scramble(module):
    for p in module.parameters(recurse=False):
        p.data.normal_()


def test_channels_last_conversion_keeps_parameter_objects():
    net = build("resnet10", width=8)
    before = list(net.parameters())
    assert backbones.channels_last_(net) is net and all(a is b for a, b in zip(net.parameters(), before))
    weight = net.conv1.weight.clone()
    backbones.channels_last_(net)
    assert torch.equal(net.conv1.weight, weight), "a second call changes nothing"
    x = torch.randn(2, 3, 32, 32)
    twin = copy.deepcopy(net)
    torch.testing.assert_close(twin.eval()(x), net.eval()(x), rtol=0, atol=0)
    twin.conv1.weight.data.zero_()
    assert net.conv1.weight.abs().sum() > 0


def test_channels_last_convolution_gives_channels_last_output():
    net = backbones.channels_last_(build("resnet10", width=16, stem="cifar"))
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    for m in net.forward_stages(x):
        assert m.is_contiguous(memory_format=torch.channels_last)


def test_sobel_filters_give_gradients_of_the_gray_image():
    net = backbones.build(Backbone("resnet10", width=8, sobel=True))
    assert net.conv1.in_channels == 2 and not any("sobel" in key for key in net.state_dict())
    ramp = torch.arange(6.0).expand(1, 3, 6, 6)  # rises by 1 per column
    inner = net.sobel(ramp)[0, :, 1:-1, 1:-1]
    assert torch.equal(inner, torch.tensor([-8.0, 0.0])[:, None, None].expand(2, 4, 4))
    colours = torch.rand(1, 3, 6, 6)
    torch.testing.assert_close(net.sobel(colours), net.sobel(colours[:, [2, 0, 1]]))
    assert net(torch.rand(2, 3, 32, 32)).shape == (2, net.dim)


VIT = "vit_tiny_patch16_224"


def test_options_are_passed_to_timm():
    net = build(VIT, options={"num_heads": 12, "drop_path_rate": 0.2, "reg_tokens": 4, "img_size": 64})
    block = net.body.blocks[-1]
    assert block.attn.num_heads == 12 and block.drop_path1.drop_prob == pytest.approx(0.2)
    assert net.body.reg_token.shape[1] == 4 and net.body.patch_embed.num_patches == 16
    assert net.train()(torch.randn(1, 3, 64, 64)).shape == (1, net.dim)
    assert build("timm/resnet18", options={"drop_path_rate": 0.1}).body.layer4[1].drop_path is not None


@pytest.mark.parametrize(
    "name, options, text",
    [
        (VIT, {"drop_path": 0.1}, "no argument 'drop_path'; did you mean 'drop_path_rate'"),
        ("convnext_atto", {"num_heads": 12}, "convnext_atto has no argument 'num_heads'"),
        ("mobilenetv3_small_050", {"drop_rat": 0.1}, "did you mean 'drop_rate'"),
        ("regnetz_b16", {"drop_rat": 0.1}, "did you mean 'drop_rate'"),
        (VIT, {"num_heads": 5}, "timm failed to build .* with backbone.options={'num_heads': 5}"),
        (VIT, {"num_heads": "many"}, "'num_heads': 'many'"),
        (VIT, {"in_chans": 1}, "use backbone.in_channels"),
        (VIT, {"pretrained": True}, "use backbone.pretrained"),
        (VIT, {"norm_layer": nn.BatchNorm1d}, "cannot be written to config.json"),
        ("resnet18", {"drop_path_rate": 0.1}, "set backbone.name='timm/resnet18'"),
    ],
)
def test_wrong_timm_options_raise(name, options, text):
    with pytest.raises(ValueError, match=text):
        build(name, options=options)
