"""Configs are checked: an unknown setting gives an error with the nearest name, a wrong value one with the type."""

import json
import subprocess
import sys

import pytest

from fastssl import config, views
from fastssl.config import Data, Optim, Run, Speed
from fastssl.methods import byol, odc, simclr

FILE = """
from fastssl import views
from fastssl.config import Backbone, Data, Optim, Run
from fastssl.methods import simclr

def get_config():
    return Run(method=simclr.Config(), backbone=Backbone("resnet18"),
               data=Data(train="x.beton", views=views.simclr(32)),
               optim=Optim(paramwise={"bias": {"weight_decay": 0.0}}))
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "configs" / "simclr" / "r18.py"
    path.parent.mkdir(parents=True)
    path.write_text(FILE)
    return path


def test_overrides_reach_every_section_with_the_right_type(file):
    run = config.load(
        file,
        [
            "optim.lr=1",
            "optim.name=adamw",
            "optim.betas=[0.8, 0.9]",
            "method.temperature=0.3",
            "data.test=a b.beton",
            "speed.micro_batch=8",
            "data.test=none",
            "log.tensorboard=false",
            "optim.paramwise.bias.lr=2",
            "seed=5",
            "deterministic=True",
            "backbone.options.drop_path_rate=0.1",
            "backbone.options.weight_init=jax",
        ],
    )
    assert run.backbone.options == {"drop_path_rate": 0.1, "weight_init": "jax"}
    assert config.dump(run)["backbone"]["options"] == run.backbone.options and config.Backbone().options == {}
    assert (run.optim.lr, type(run.optim.lr)) == (1.0, float)
    assert run.optim.betas == (0.8, 0.9)
    assert run.method.temperature == 0.3 and simclr.Config().temperature == 0.1
    assert run.data.test is None and run.speed.micro_batch == 8 and run.log.tensorboard is False
    assert run.optim.paramwise == {"bias": {"weight_decay": 0.0, "lr": 2}}
    assert run.seed == 5 and run.deterministic is True
    assert run.name == "simclr/r18"


@pytest.mark.parametrize(
    "override, message",
    [
        ("optim.wieght_decay=1", "did you mean 'weight_decay'"),
        ("optm.lr=1", "did you mean 'optim'"),
        ("method.temprature=1", "did you mean 'temperature'"),
        ("optim.lr=fast", "optim.lr: expected float, got 'fast'"),
        ("optim.batch=1.5", "optim.batch: expected int, got 1.5"),
        ("optim.batch=True", "optim.batch: expected int, got True"),
        ("log.tensorboard=1", "log.tensorboard: expected bool, got 1"),
        ("optim.name=larz", "did you mean 'lars'"),
        ("speed.zero=4", "speed.zero=4 is not one of 0, 1, 2, 3"),
        ("speed.micro_batch=0", "speed.micro_batch=0 must be at least 1 and finite, or None"),
        ("optim.steps=0", "optim.steps=0 must be at least 1 and finite, or None"),
        ("optim.momentum=2", "optim.momentum=2.0 must be at least 0 and below 1"),
        ("optim.weight_decay=-1", "optim.weight_decay=-1.0 must be at least 0"),
        ("optim.milestones=(1,2)", "no effect with optim.schedule='cosine', only with 'step'"),
        ("optim.eta=0.02", "no effect with optim.name='sgd', only with 'lars': set optim.name, or optim.eta=0.001"),
        ("optim.betas=(0.9,0.95)", "no effect with optim.name='sgd', only with 'adamw'"),
        ("optim.lr_end=2.0", "optim.lr_end=2.0 must be at least 0 and at most 1"),
        ("optim.warmup_ratio=-0.1", "optim.warmup_ratio=-0.1 must be at least 0 and at most 1"),
        ("optim.lr=0", "optim.lr=0.0 must be above 0 and finite"),
        ("optim.lr.x=1", "optim.lr.x: float has no settings below it"),
        ("optim.lr", "is not of the form a.b=value"),
        ("optim.betas=[1,2,3]", "expected 2 values"),
        ("optim.warmup_epochs=-1", "optim.warmup_epochs=-1.0 must be at least 0 and finite"),
        ("optim.clip=1e999", "optim.clip=inf must be at least 0 and finite"),
        ("log.knn_epochs=-2", "log.knn_epochs=-2 must be at least 0"),
        ("log.keep=-2", "log.keep=-2 must be at least 1, or -1 to keep every checkpoint"),
        ("log.keep=0", "log.keep=0 must be at least 1, or -1 to keep every checkpoint"),
        ("optim.betas=(0.9,-1.0)", "optim.betas=-1.0 must be at least 0 and finite"),
        ("backbone.frozen=-1", "backbone.frozen=-1 must be"),
        ("data.views.2.blur=0.5", "data.views.2.blur: '2' is not one of its 2 places: 0 to 1, or all"),
        ("data.views.blur=0.5", "'blur' is not one of its 2 places"),
        ("data.views.0.blurr=0.5", "did you mean 'blur'"),
        ("data.views.0.blur=x", "expected float, got 'x'"),
        ("data.views.0.blur=2", "data.views.0.blur: View(blur=2.0): must be a probability"),
        ("data.views=moco_v3", "did you mean 'moco_v2'"),
        ("data.views=simclr(size=8, blurr=1)", "did you mean 'blur'"),
        ("data.views=[1]", "give a name, or name(argument=value, ...)"),
        ("data.eval_view=simclr", "this recipe has 2"),
        ("method=boyl", "did you mean 'byol'"),
        ("method=byol(momentm=1)", "did you mean 'momentum'"),
        ("method=simclr.Config()", "give a name"),
        ("log.root.x=1", "str has no settings below it"),
        ("speed.zero=True", "speed.zero=True is not one of 0, 1, 2, 3"),
        ("method.init=kaiming", "method.init='kaiming' is not one of torch, openselfsup"),
    ],
)
def test_wrong_overrides_raise_with_the_nearest_name(file, override, message):
    with pytest.raises(ValueError) as error:
        config.load(file, [override])
    assert message in str(error.value)


def test_one_view_or_all_of_them_are_changed(file):
    run = config.load(
        file,
        [
            "data.views.1.blur=0.1",
            "data.views.all.jitter=(0.4, 0.4, 0.2, 0.1)",
            "data.views.0.stream=5",
            "optim.betas.1=0.95",
            "optim.name=adamw",
        ],
    )
    assert [v.blur for v in run.data.views] == [0.5, 0.1] and run.data.views[0].stream == 5
    assert all(v.jitter == (0.4, 0.4, 0.2, 0.1) for v in run.data.views) and run.optim.betas == (0.9, 0.95)
    assert '"blur": 0.1' in run.data.views[1].json  # what the kernels read


def test_a_recipe_and_a_method_are_named(file):
    run = config.load(file, ["method.momentum=0.9", "method=byol", "data.views=moco_v2", "data.eval_view=center"])
    assert run.method == byol.Config(momentum=0.9)  # whatever the order, the method comes first
    assert run.data.views == views.moco_v2(32) and run.data.eval_view == views.center(32)[0]
    run = config.load(
        file, ["method=simclr(temperature=0.3, dims=(64, 32))", "data.views=swav(64, small=24)", "data.views.2.blur=0"]
    )
    assert run.method == simclr.Config(temperature=0.3, dims=(64, 32))
    assert [v.size for v in run.data.views] == [64, 64] + [24] * 6 and run.data.views[2].blur == 0
    other = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    path = file.with_name("other.py")
    path.write_text(FILE.replace("views.simclr(32)", f"views.simclr(32, interpolation='bicubic', **{other})"))
    assert config.load(path, ["data.views=byol"]).data.views == views.byol(32, **other)  # the data's, not the recipe's


@pytest.mark.parametrize(
    "text, read",
    [
        ("name=20241126", "20241126"),
        ("name=2024_01", "2024_01"),
        ("name=1e5", "1e5"),
        ("name=None", "None"),
        ("name='a b'", "a b"),
        ("data.train=0001", "0001"),
        ("data.train=1.5", "1.5"),
        ("data.test=12", "12"),
        ("data.test=none", None),
        ("backbone.pretrained=7", "7"),
    ],
)
def test_text_is_taken_as_it_is(file, text, read):
    run = config.load(file, [text])
    key = text.partition("=")[0].split(".")
    assert getattr(run if len(key) == 1 else getattr(run, key[0]), key[-1]) == read


def test_a_run_without_a_name_gets_one():
    run = Run(
        method=simclr.Config(),
        backbone=config.Backbone("resnet18"),
        data=Data(train="data/mine.beton", views=views.simclr(8)),
    )
    config.validate(run)
    assert run.name == "simclr/resnet18_mine"


def test_every_norm_of_a_backbone_can_be_set(file):
    for norm in ("bn", "gn", "frozen"):
        assert config.load(file, [f"backbone.norm={norm}"]).backbone.norm == norm


def test_files_that_are_not_configs_raise(file, tmp_path):
    with pytest.raises(ValueError, match="did you mean .*r18.py"):
        config.load(str(file).replace("r18", "r81"))
    empty = tmp_path / "empty.py"
    empty.write_text("")
    with pytest.raises(ValueError, match="has no get_config"):
        config.load(empty)
    empty.write_text("def get_config(): return 3")
    with pytest.raises(ValueError, match="returned int"):
        config.load(empty)


def test_a_config_without_views_or_of_the_wrong_type_is_refused():
    with pytest.raises(ValueError, match="data.views is empty"):
        config.validate(Run(method=simclr.Config()))
    with pytest.raises(ValueError, match="optim.lr: expected float, got 'x'"):
        config.validate(Run(method=simclr.Config(), data=Data(views=views.simclr(8)), optim=Optim(lr="x")))


def test_the_dump_is_json_with_every_setting(file):
    dumped = json.loads(json.dumps(config.dump(config.load(file))))
    assert dumped["method"] == {
        "type": "fastssl.methods.simclr.Config",
        "temperature": 0.1,
        "dims": [2048, 128],
        "norm": True,
        "last_shift": True,
        "init": "torch",
    }
    assert dumped["backbone"]["name"] == "resnet18"
    assert len(dumped["data"]["views"]) == 2 and dumped["data"]["views"][0]["size"] == 32


def test_fields_added_since_a_dump_have_their_defaults(file):
    """So that a run of an older version is continued; a changed value, or a field that went away, is still seen."""
    run = config.load(file)
    now = config.dump(run)
    for section, remove in (("backbone", "options"), ("optim", "clip_each"), ("optim", "betas"), ("method", "init")):
        older = {k: v for k, v in now[section].items() if k != remove}
        assert older != now[section] and config.with_defaults(older, getattr(run, section)) == now[section]
    older = json.loads(json.dumps(now["data"]))
    del older["views"][1]["extra"]
    assert config.with_defaults(older, run.data) == now["data"]
    older["views"][1]["blur"] = 0.25
    assert config.with_defaults(older, run.data) != now["data"]
    assert config.with_defaults({**now["optim"], "gone": 1}, run.optim) != now["optim"]
    method = odc.Config(min_cluster_size=5)
    older = config.dump(method)
    older["least"], older["every"] = older.pop("min_cluster_size"), older.pop("centroid_interval")
    assert config.with_defaults(older, method) == config.dump(method), "fields that were renamed"
    for old, new in ((False, "off"), (True, "on"), ("auto", "auto")):
        run.speed.compile = new
        assert config.with_defaults(config.dump(run.speed) | {"compile": old}, Speed()) == config.dump(run.speed)
    view = dict(now["data"]["views"][0], type="fastssl.kernels.views.params.View")
    assert config.with_defaults(view, run.data.views[0]) == now["data"]["views"][0], "a class that has moved"


def test_methods_and_configs_load_without_deepspeed():
    """It picks CPU or CUDA when it is imported; `fastssl train` decides first."""
    code = "import sys, fastssl.methods as m; m.main([]); sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0
