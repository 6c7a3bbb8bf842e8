"""Weights of other projects are loaded completely or refused; torchvision reads our exports."""

import io
import os
import pickle
import shlex
import zipfile

import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

from fastssl import backbones, weights
from fastssl.checkpoint import disk
from fastssl.config import Backbone
from fastssl.weights import export


def build(name="resnet18", seed=0, **options):
    torch.manual_seed(seed)
    net = backbones.build(Backbone(name=name, **options)).eval()
    for m in net.modules():  # so that a statistic left out shows
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
            m.num_batches_tracked.fill_(7)
    return net


def same(a, b):
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


@pytest.fixture(scope="module")
def small():
    return build("resnet10", width=8, stem="cifar")


def other(net):
    return build(seed=1, **{k: getattr(net.spec, k) for k in ("name", "width", "stem")})


def prefixed(net, prefix):
    return {prefix + k: v for k, v in net.state_dict().items()}


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("ohwi", [False, True])
def test_torchvision_loads_the_export_with_equal_outputs(tmp_path, name, ohwi):
    net = build(name)
    if ohwi:
        backbones.channels_last_(net)
    export.write(net, tmp_path / "a.pth", to="torchvision")
    theirs = getattr(torchvision.models, name)().eval()
    result = theirs.load_state_dict(torch.load(tmp_path / "a.pth", weights_only=True), strict=False)
    assert result.missing_keys == ["fc.weight", "fc.bias"] and result.unexpected_keys == []
    theirs.fc = nn.Identity()
    x = torch.randn(2, 3, 64, 64, dtype=torch.double)  # in fp32 the two memory layouts differ by 1e-4 from rounding
    with torch.no_grad():
        torch.testing.assert_close(theirs.double()(x), net.double()(x), rtol=0, atol=1e-6)
    assert os.listdir(tmp_path) == ["a.pth"], "no temporary file stays"


@pytest.mark.parametrize("options", [{"stem": "cifar"}, {"norm": "gn"}, {"in_channels": 1, "norm": "gn"}])
def test_the_code_printed_by_an_export_runs(tmp_path, options):
    net = build(**options)
    scope = {}
    exec(export.write(net, tmp_path / "a.pth"), scope)
    theirs = scope["net"].eval()
    theirs.fc = nn.Identity()
    x = torch.randn(2, options.get("in_channels", 3), 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), net(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "name, options", [("resnet10", {"width": 8, "stem": "cifar"}), ("vit_tiny_patch16_224", {}), ("resnet18", {})]
)
def test_a_safetensors_export_loads_with_equal_outputs(tmp_path, name, options):
    net = backbones.channels_last_(build(name, **options))
    file = tmp_path / "deep" / "a.safetensors"
    export.write(net, file, to="safetensors")
    spec = weights.spec_of(file)
    assert spec == net.spec
    torch.manual_seed(5)
    twin = backbones.build(spec)
    report = weights.load_backbone(file, twin)
    assert same(net, twin) and report.loaded == len(net.state_dict()) and not report.heads and not report.other


@pytest.mark.parametrize(
    "options, to, text",
    [
        ({"name": "test_vit"}, "torchvision", "torchvision has no test_vit: export with --to timm"),
        ({}, "onnx", "known are torchvision, timm, "),
    ],
)
def test_export_refuses_networks_that_a_tool_lacks(tmp_path, options, to, text):
    with pytest.raises(ValueError, match=text):
        export.write(build(**options), tmp_path / "a", to)
    assert os.listdir(tmp_path) == []


def test_the_classifier_of_a_torchvision_state_dict_is_reported(tmp_path):
    theirs = torchvision.models.resnet18()
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    net = build()
    report = weights.load_backbone(tmp_path / "a.pth", net)
    assert report.heads == ["fc.weight", "fc.bias"] and report.prefix == "" and "fc.weight" in str(report)
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in net.state_dict().items())


MOCO = {"epoch": 3, "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}}}


@pytest.mark.parametrize(
    "wrap, prefix",
    [
        (lambda n, o: n.state_dict(), ""),
        (lambda n, o: prefixed(n, "module."), "module."),
        (
            lambda n, o: {"state_dict": prefixed(n, "backbone.") | {"neck.0.weight": torch.ones(2)}},
            "state_dict.backbone.",
        ),
        (
            lambda n, o: {
                **MOCO,
                "state_dict": prefixed(o, "module.encoder_k.")
                | prefixed(n, "module.encoder_q.")
                | {"module.encoder_q.fc.0.weight": torch.ones(2), "module.queue": torch.ones(2)},
            },
            "state_dict.module.encoder_q.",
        ),
        (
            lambda n, o: {"student": prefixed(o, "module.backbone."), "teacher": prefixed(n, "backbone.")},
            "teacher.backbone.",
        ),
        (lambda n, o: prefixed(o, "target.0.") | prefixed(n, "backbone.") | {"queue": torch.ones(2)}, "backbone."),
        (lambda n, o: {"a": {"very": {"deep": n.state_dict()}}}, "a.very.deep."),
    ],
)
@pytest.mark.parametrize("ohwi", [False, True])
def test_prefixes_are_found_by_keys(tmp_path, small, wrap, prefix, ohwi):
    torch.save(wrap(small, other(small)), tmp_path / "a.pt")
    net = other(small)
    if ohwi:
        backbones.channels_last_(net)
    report = weights.load_backbone(tmp_path / "a.pt", net)
    assert report.prefix == prefix and same(small, net)
    assert not {"state_dict", "module"} & report.other.keys()  # which say nothing about what is in the file


def test_two_different_copies_need_a_choice(tmp_path, small):
    torch.save(prefixed(small, "one.") | prefixed(other(small), "two."), tmp_path / "a.pt")
    net = other(small)
    with pytest.raises(ValueError, match=r"'one\.' and at 'two\.'"):
        weights.load_backbone(tmp_path / "a.pt", net)
    weights.load_backbone(tmp_path / "a.pt", net, prefix="one")
    assert same(small, net)


@pytest.mark.parametrize("size", [96, 448])
def test_positions_of_another_size_are_resampled(tmp_path, size):
    """Loaded into a network for 224 pixels, a table for 96 or 448 pixels gives the same outputs on images of 224."""
    options = {"depth": 2}
    theirs = build("vit_tiny_patch16_224", options={**options, "img_size": size})
    torch.save({"model": theirs.body.state_dict()}, tmp_path / "a.pth")
    net = build("vit_tiny_patch16_224", seed=1, options=options)
    report = weights.load_backbone(tmp_path / "a.pth", net)
    side = size // 16
    assert f"positions resampled from {side} x {side} to 14 x 14 patches" in str(report)
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(net(x), theirs(x), rtol=0, atol=1e-5)
    same_size = build("vit_tiny_patch16_224", seed=1, options={**options, "img_size": size})
    assert weights.load_backbone(tmp_path / "a.pth", same_size).resampled is None


def test_positions_that_are_not_a_square_grid_are_refused(tmp_path):
    theirs = build("vit_tiny_patch16_224", options={"depth": 1, "img_size": (64, 96)})
    torch.save(theirs.body.state_dict(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"pos_embed is \(1, 25, 192\) in the file and \(1, 197, 192\)"):
        weights.load_backbone(tmp_path / "a.pth", build("vit_tiny_patch16_224", options={"depth": 1}))


def drop(key):
    return lambda state: state.pop(key)


def put(key, value):
    return lambda state: state.__setitem__(key, value)


@pytest.mark.parametrize(
    "damage, text",
    [
        (drop("layer3.0.conv2.weight"), r"1 of the backbone's \d+ tensors are not in it: layer3.0.conv2.weight"),
        (drop("layer4.0.bn1.running_mean"), "layer4.0.bn1.running_mean"),
        (put("layer1.1.conv1.weight", torch.ones(8, 8, 3, 3)), "1 of its tensors load nowhere: layer1.1.conv1.weight"),
        (put("mystery", torch.ones(2)), "load nowhere: mystery"),
        (put("conv1.weight", torch.ones(8, 3, 7, 7)), r"conv1.weight is \(8, 3, 7, 7\) in the file.*stem"),
        (put("bn1.weight", torch.full((8,), float("nan"))), "bn1.weight holds NaN"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_incomplete_weights_are_refused_and_change_nothing(tmp_path, small, damage, text, prefix):
    state = dict(small.state_dict())
    damage(state)
    torch.save({prefix + k: v for k, v in state.items()}, tmp_path / "a.pt")
    net = other(small)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(ValueError, match=text):
        weights.load_backbone(tmp_path / "a.pt", net)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_files_without_num_batches_tracked_load(tmp_path, small):
    state = {k: v for k, v in small.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "a.pt")
    net = other(small)
    assert weights.load_backbone(tmp_path / "a.pt", net).loaded == len(state)
    assert same(small, net)


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


def test_a_pickle_that_would_run_code_is_refused(tmp_path, small, monkeypatch):
    monkeypatch.setenv("BOMB", str(tmp_path / "ran"))
    torch.save({"state_dict": small.state_dict(), "args": Bomb()}, tmp_path / "zip.pth")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"model": Bomb()}, protocol=2))
    for name in ("zip.pth", "plain.pkl"):
        with pytest.raises(ValueError, match=r"refused.*mkdir[\s\S]*weights_only=False"):
            weights.load_backbone(tmp_path / name, other(small))
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "zip.pth", weights_only=False)
    assert (tmp_path / "ran").exists(), "the bomb is live: the test above would see it go off"


def _torn(file):
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda f: None, "no weights at"),
        (lambda f: f.write_bytes(b""), "not a complete PyTorch file"),
        (lambda f: f.write_text("not a checkpoint at all"), "not a pickle of tensors alone"),
        (lambda f: torch.save([torch.ones(2)], f), "holds a list"),
        (lambda f: torch.save({"x": torch.ones(2)}, f), "none of the backbone's keys .conv1.weight.*it has x"),
        (lambda f: (torch.save({"x": torch.ones(2000)}, f), _torn(f)), "not a complete PyTorch file"),
        (lambda f: torch.jit.script(nn.Linear(2, 2)).save(str(f)), "TorchScript"),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_files_that_are_not_weights_are_refused(tmp_path, small, make, text):
    make(tmp_path / "a.pth")
    with pytest.raises(ValueError, match=text):
        weights.load_backbone(tmp_path / "a.pth", small)


def test_a_truncated_safetensors_file_is_refused(tmp_path, small):
    export.write(small, tmp_path / "a.safetensors", "safetensors")
    _torn(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        weights.load_backbone(tmp_path / "a.safetensors", small)


def test_run_folders_and_checkpoints_load(tmp_path, small):
    nets = {1: other(small), 2: small}
    for step, net in nets.items():
        temporary = disk.create(tmp_path, step)
        state = prefixed(net, "backbone.") | prefixed(other(small), "target.0.") | {"queue": torch.ones(3)}
        safetensors.torch.save_file({k: v.clone() for k, v in state.items()}, temporary / "weights.safetensors")
        path = disk.commit(temporary, keep=2)
    for source in (tmp_path, path):
        net = build(seed=2, name="resnet10", width=8, stem="cifar")
        report = weights.load_backbone(source, net)
        assert same(small, net) and report.other == {"target": len(net.state_dict()), "queue": 1}
    _torn(path / "weights.safetensors")
    with pytest.raises(ValueError, match="is damaged: weights"):
        weights.load_backbone(path, small)
    net = build(seed=2, name="resnet10", width=8, stem="cifar")
    weights.load_backbone(tmp_path, net)
    assert same(nets[1], net), "a run folder falls back to the checkpoint before"
    with pytest.raises(ValueError, match="no complete checkpoint"):
        weights.load_backbone(tmp_path / "checkpoints", small)


@pytest.mark.parametrize("name", ["a.pth", "a $(touch x) `touch x` 'b\" $HOME.pth"])
def test_the_conversion_proposed_in_the_error_works(tmp_path, small, monkeypatch, name):
    """A shell splits the command in the error as it is meant, whatever the file is called."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BOMB", str(tmp_path / "ran"))
    torch.save({"state_dict": small.state_dict(), "args": Bomb()}, name)
    net = other(small)
    with pytest.raises(ValueError) as error:
        weights.load_backbone(name, net)
    words = shlex.split(str(error.value).splitlines()[1])
    assert words[:2] == ["python", "-c"] and len(words) == 3
    exec(words[2], {})
    weights.load_backbone("weights.pth", net)
    assert same(small, net)


def test_a_zip_with_another_pickle_is_refused(tmp_path, small):
    buffer = io.BytesIO()
    torch.save(small.state_dict(), buffer)
    with zipfile.ZipFile(buffer) as good, zipfile.ZipFile(tmp_path / "a.pth", "w") as bad:
        for item in good.infolist():
            data = pickle.dumps(print, protocol=2) if item.filename.endswith("data.pkl") else good.read(item)
            bad.writestr(item, data)
    with pytest.raises(ValueError, match=r"refused.*print"):
        weights.load_backbone(tmp_path / "a.pth", small)


def test_dinos_teacher_is_loaded_by_default(tmp_path, small):
    """Of other methods the student is loaded by default."""
    teacher = other(small)
    state = {**prefixed(small, "backbone."), **prefixed(teacher, "target.0.")}
    for extra, want in (({}, small), ({"target.1.prototypes.weight": torch.zeros(3, 4)}, teacher)):
        safetensors.torch.save_file({**state, **extra}, tmp_path / "weights.safetensors")
        for which, expected in ((None, want), ("student", small), ("teacher", teacher)):
            found = other(small)
            weights.load_backbone(tmp_path / "weights.safetensors", found, which=which)
            assert same(expected, found), (extra.keys(), which)
