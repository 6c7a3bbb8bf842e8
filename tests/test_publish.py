"""`fastssl publish`, `params` and `upgrade`."""

import hashlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
import torchvision

from fastssl import backbones, config, params, views, weights
from fastssl.__main__ import COMMANDS, main
from fastssl.checkpoint import disk
from fastssl.config import Backbone
from fastssl.files.datacard import DataCard
from fastssl.methods import byol
from fastssl.trainer import Context
from fastssl.weights.publish import publish

SMALL = Backbone("resnet10", width=8, stem="cifar")


def build(seed=0, spec=SMALL):
    torch.manual_seed(seed)
    return backbones.build(spec)


@pytest.fixture
def run_folder(tmp_path):
    data = config.Data(train="/secret/place/y.beton", views=views.byol(32))
    backbone, log = replace(SMALL, pretrained="/secret/place/w.pth"), config.Log(root="/secret/place")
    run = config.Run(method=byol.Config(), backbone=backbone, name="byol/mine", data=data, log=log)
    folder = tmp_path / "run"
    temporary = disk.create(folder, 1)
    state = {f"backbone.{k}": v for k, v in build().state_dict().items()}
    state |= {f"target.0.{k}": v for k, v in build(1).state_dict().items()}
    safetensors.torch.save_file(state, temporary / "weights.safetensors")
    (temporary / "deepspeed").mkdir()
    torch.save({"optimizer": torch.ones(1000)}, temporary / "deepspeed" / "optimizer.pt")
    disk.commit(temporary, keep=1)
    (folder / "config.json").write_text(json.dumps(config.dump(run)))
    return folder


def test_publish_a_run(run_folder, capsys):
    assert main(["publish", str(run_folder)]) == 0
    out = capsys.readouterr().out
    (file,) = run_folder.glob("*.safetensors")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert file.name == f"byol_mine-{digest[:8]}.safetensors" and digest in out
    assert not [key for key in safetensors.torch.load_file(file) if "optim" in key]
    with safetensors.safe_open(file, "pt") as f:
        run = json.loads(f.metadata()["fastssl.config"])
    assert run["data"]["train"] == "y.beton" and run["backbone"]["pretrained"] == "w.pth"
    assert "secret" not in json.dumps(run)
    assert weights.spec_of(file) == SMALL
    for which, seed in (("student", 0), ("teacher", 1)):
        net = build(2)
        weights.load_backbone(file, net, which=which)
        assert all(torch.equal(v, build(seed).state_dict()[k]) for k, v in net.state_dict().items())
    for _ in range(5):
        assert publish(run_folder) == (file, digest), "the same weights, the same name"


def test_publish_a_foreign_checkpoint_without_its_optimizer(tmp_path):
    net = build()
    shared = net.state_dict()
    state = {f"backbone.{k}": v for k, v in shared.items()} | {f"encoder_q.0.{k}": v for k, v in shared.items()}
    torch.save(
        {
            "meta": {"x": torch.ones(2)},
            "state_dict": state,
            "optimizer": {"state": {0: {"exp_avg": torch.ones(50)}}, "master": torch.ones(50)},
        },
        tmp_path / "epoch_9.pth",
    )
    path, digest = publish(tmp_path / "epoch_9.pth", tmp_path / "out", "mine")
    assert path == tmp_path / "out" / f"mine-{digest[:8]}.safetensors"
    assert set(safetensors.torch.load_file(path)) == set(state)
    again, _ = publish(path, tmp_path / "out")
    assert again == path, "publishing what is published does not add a second hash"
    assert weights.load_backbone(path, build(1)).prefix == "backbone."


@pytest.mark.parametrize(
    "content, text",
    [
        ({"optimizer": {"x": torch.ones(2)}}, "no weights to publish"),
        ({"state_dict": {"w": torch.tensor([1.0, float("nan")])}}, "w holds NaN"),
    ],
)
def test_publish_refuses_files_without_finite_weights(content, text, tmp_path, capsys):
    torch.save(content, tmp_path / "a.pth")
    assert main(["publish", str(tmp_path / "a.pth")]) == 2
    assert text in capsys.readouterr().err and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_params_equal_torchvisions(name):
    """torchvision publishes parameters and GMACs of its networks; ours lack fc."""
    rows = dict(params.params(name))
    meta = torchvision.models.get_model_weights(name).DEFAULT.meta
    inside = 512 if name == "resnet18" else 2048
    assert int(rows["backbone's parameters"].split()[0].replace(",", "")) == meta["num_params"] - 1000 * (inside + 1)
    macs = float(re.search(r"\(([\d.]+) GMACs", rows["backbone's forward, one image of 224 x 224"])[1])
    assert macs == pytest.approx(meta["_ops"] - inside * 1000 / 1e9, abs=2e-3)


def test_flops_of_a_vit_equal_a_count_by_hand():
    d, n, depth = 192, 197, 12
    expected = 2 * (768 * d * 196 + depth * n * (12 * d * d + 2 * n * d))  # patches; 4 + 8 products of d x d; attention
    with torch.device("meta"):
        net = backbones.build(Backbone("vit_tiny_patch16_224"))
    assert params.flops(net, 224) == expected


def test_params_takes_options_of_timms_models(capsys):
    assert main(["params", "vit_tiny_patch16_224", "--option", "depth=2", "--option", "reg_tokens=4"]) == 0
    net = backbones.build(Backbone("vit_tiny_patch16_224", options={"depth": 2, "reg_tokens": 4}))
    assert f"{sum(p.numel() for p in net.parameters()):,}" in capsys.readouterr().out


def test_params_of_a_config(tmp_path, capsys):
    file = tmp_path / "c.py"
    file.write_text(
        "from fastssl import views\nfrom fastssl.config import *\nfrom fastssl.methods import moco\n"
        "def get_config():\n    return Run(method=moco.Config(queue=64), backbone=Backbone('resnet10', "
        "stem='cifar', width=8), data=Data(train='x', views=views.swav(32, small=16)), "
        "optim=Optim(batch=8))\n"
    )
    assert main(["params", str(file), "backbone.width=16"]) == 0
    out = capsys.readouterr().out
    small = Backbone("resnet10", width=16, stem="cifar")
    total = sum(p.numel() for p in build(spec=small).parameters())
    assert f"{total:,}" in out and "32 x 32" in out and "16 x 16" in out
    run = config.load(file, ["backbone.width=16"])
    with pytest.warns(UserWarning, match="no effect on one GPU"):  # in a training, and not in `params`
        method = run.method.build(build(spec=small), Context(samples=100, batch=8))
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in method.parameters())
    assert everything > trained and f"{everything:,}" in out and f"{trained:,}" in out


def test_params_takes_the_size_of_a_bank_from_the_data_card(tmp_path):
    file = Path(__file__).parents[1] / "configs/npid/r50_in1k_200ep.py"
    DataCard(samples=1000, bytes=0, max_pixels=1).write(tmp_path / "x.json")
    rows = dict(params.params(str(file), [f"data.train={tmp_path}/x.beton"]))
    more = dict(params.params(str(file), [f"data.train={tmp_path}/none.beton"]))
    mib = [float(r[f"method's buffers at {n} samples"].split()[0]) for r, n in ((rows, "1,000"), (more, "1,281,167"))]
    assert mib[1] - mib[0] == pytest.approx((1_281_167 - 1000) * 128 * 4 / 2**20, abs=0.02)


@pytest.mark.parametrize(
    "argv, text",
    [
        (["resnet5"], "did you mean"),
        (["resnet50", "optim.lr=1"], "is a backbone"),
        (["vit_tiny_patch16_224", "--option", "dept=2"], "did you mean 'depth'"),
        (["resnet50", "--option", "drop_path_rate=0.1"], "backbone.name='timm/resnet50'"),
        (["nowhere.py"], "nowhere.py"),
    ],
)
def test_params_refuses_wrong_arguments(argv, text, capsys):
    assert main(["params", *argv]) == 2
    assert text in capsys.readouterr().err


def old_file(tmp_path):
    net = build()
    state = {f"module.{k}": v for k, v in net.state_dict().items()} | {"module.head.fc_cls.weight": torch.ones(2, 2)}
    torch.save(state, tmp_path / "old.pth")
    return net


def test_upgrade_drops_the_head(tmp_path, capsys):
    net = old_file(tmp_path)
    assert main(["upgrade", str(tmp_path / "old.pth"), str(tmp_path / "new.pth")]) == 0
    assert "head.fc_cls.weight" in capsys.readouterr().out
    new = torch.load(tmp_path / "new.pth", weights_only=True)
    assert set(new) == {"state_dict", "author"} and set(new["state_dict"]) == set(net.state_dict())
    other = build(1)
    weights.load_backbone(tmp_path / "new.pth", other)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in other.state_dict().items())


def test_upgrade_with_a_backbone_writes_its_description(tmp_path, capsys):
    net = old_file(tmp_path)
    argv = [
        "upgrade",
        str(tmp_path / "old.pth"),
        str(tmp_path / "new.safetensors"),
        "--backbone",
        "resnet10",
        "--width",
        "8",
        "--stem",
        "cifar",
    ]
    assert main(argv) == 0
    assert weights.spec_of(tmp_path / "new.safetensors") == SMALL
    state = safetensors.torch.load_file(tmp_path / "new.safetensors")
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items()) and "head" not in "".join(state)
    assert main(argv) == 2 and "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, text",
    [
        (["new.txt"], "must end in"),
        (["new.pth", "--backbone", "resnet10"], "must end in .safetensors"),
        (["new.safetensors", "--width", "8"], "give its --backbone"),
        (["new.safetensors", "--backbone", "resnet18"], "does not fit the backbone"),
    ],
)
def test_upgrade_refuses_wrong_arguments(argv, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    old_file(tmp_path)
    assert main(["upgrade", "old.pth", *argv]) == 2
    assert text in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["old.pth"]


def test_every_command_has_help(capsys):
    for command in ("publish", "params", "upgrade", "export"):
        assert command in COMMANDS
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        assert end.value.code == 0 and f"usage: fastssl {command}" in capsys.readouterr().out
    code = "import sys, fastssl.__main__ as m; m.main(['--help']); sys.exit('fastssl.doctor' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0
