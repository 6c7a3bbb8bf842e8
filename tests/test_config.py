"""A config is typed data: a wrong name is answered with the right one, a wrong value with the wanted type."""

import json
import subprocess
import sys

import pytest

from fastssl import config, views
from fastssl.config import Data, Optim, Run
from fastssl.methods import simclr

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
    run = config.load(file, ["optim.lr=1", "optim.name=adamw", "optim.betas=[0.8, 0.9]", "method.temperature=0.3",
                             "data.test=a b.beton", "speed.micro_batch=8", "data.test=none", "log.tensorboard=false",
                             "optim.paramwise.bias.lr=2", "seed=5", "deterministic=True",
                             "backbone.options.drop_path_rate=0.1", "backbone.options.weight_init=jax"])
    assert run.backbone.options == {"drop_path_rate": 0.1, "weight_init": "jax"}
    assert config.dump(run)["backbone"]["options"] == run.backbone.options and config.Backbone().options == {}
    assert (run.optim.lr, type(run.optim.lr)) == (1.0, float)
    assert run.optim.betas == (0.8, 0.9)
    assert run.method.temperature == 0.3 and simclr.Config().temperature == 0.1
    assert run.data.test is None and run.speed.micro_batch == 8 and run.log.tensorboard is False
    assert run.optim.paramwise == {"bias": {"weight_decay": 0.0, "lr": 2}}
    assert run.seed == 5 and run.deterministic is True
    assert run.name == "simclr/r18"


@pytest.mark.parametrize("override, message", [
    ("optim.wieght_decay=1", "did you mean 'weight_decay'"),
    ("optm.lr=1", "did you mean 'optim'"),
    ("method.temprature=1", "did you mean 'temperature'"),
    ("optim.lr=fast", "optim.lr: wants float, got 'fast'"),
    ("optim.batch=1.5", "optim.batch: wants int, got 1.5"),
    ("optim.batch=True", "optim.batch: wants int, got True"),
    ("log.tensorboard=1", "log.tensorboard: wants bool, got 1"),
    ("optim.name=larz", "did you mean 'lars'"),
    ("speed.zero=4", "speed.zero=4 is none of 0, 1, 2, 3"),
    ("speed.micro_batch=0", "speed.micro_batch=0 must be at least 1, or None"),
    ("optim.steps=0", "optim.steps=0 must be at least 1, or None"),
    ("optim.momentum=2", "optim.momentum=2.0 must be at least 0, below 1"),
    ("optim.weight_decay=-1", "optim.weight_decay=-1.0 must be at least 0"),
    ("optim.milestones=(1,2)", "no effect with optim.schedule='cosine', only with 'step'"),
    ("optim.eta=0.02", "no effect with optim.name='sgd', only with 'lars': set optim.name, or optim.eta=0.001"),
    ("optim.betas=(0.9,0.95)", "no effect with optim.name='sgd', only with 'adamw'"),
    ("optim.lr_end=2.0", "part of lr: at least 0, at most 1"), ("optim.warmup_ratio=-0.1", "part of lr"),
    ("optim.lr=0", "optim.lr=0.0 must be positive"),
    ("optim.lr.x=1", "optim.lr.x: float has no settings below it"),
    ("optim.lr", "is not of the form a.b=value"),
    ("optim.betas=[1,2,3]", "wants 2 values"),
])
def test_mistakes_are_answered(file, override, message):
    with pytest.raises(ValueError) as error:
        config.load(file, [override])
    assert message in str(error.value)


def test_every_norm_that_a_backbone_knows_can_be_asked_for(file):
    for norm in ("bn", "gn", "frozen"):
        assert config.load(file, [f"backbone.norm={norm}"]).backbone.norm == norm


def test_files_that_are_no_configs(file, tmp_path):
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
    with pytest.raises(ValueError, match="optim.lr: wants float, got 'x'"):
        config.validate(Run(method=simclr.Config(), data=Data(views=views.simclr(8)), optim=Optim(lr="x")))


def test_the_dump_is_json_and_says_everything(file):
    dumped = json.loads(config.dumps(config.load(file)))
    assert dumped["method"] == {"type": "fastssl.methods.simclr.Config", "temperature": 0.1, "dims": [2048, 128],
                                "norm": True}
    assert dumped["backbone"]["name"] == "resnet18"
    assert len(dumped["data"]["views"]) == 2 and dumped["data"]["views"][0]["size"] == 32


def test_methods_and_configs_load_without_deepspeed():
    """It picks CPU or CUDA when it is imported; `fastssl train` decides first."""
    code = "import sys, fastssl.methods as m; m.main([]); sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0
