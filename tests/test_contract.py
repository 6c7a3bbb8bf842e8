"""An incomplete method or hook is refused with one sentence, before training or at its first step."""

import dataclasses
import importlib
import warnings

import pytest
import torch
from bare_trainer import bare_trainer
from torch import nn

from fastssl import backbones, config, contract, engine, hooks, loader, methods, views
from fastssl.build import build_method, prepare
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import simclr
from fastssl.trainer import Context


class Small(nn.Module):
    views = 2

    def __init__(self, backbone, out=None, losses=None):
        super().__init__()
        self.backbone, self.out, self.losses = backbone, out, losses

    def forward(self, views, batch):
        z = torch.stack([self.backbone(x) for x in views], 1)
        return {"z": z, "features": z[:, 0].detach()} if self.out is None else self.out(z)

    def loss(self, out, batch):
        return {"loss": out["z"].square().mean()} if self.losses is None else self.losses(out["z"])

    def after_step(self, out, batch, progress):
        pass


def made(kind=Small, **options):
    @dataclasses.dataclass(frozen=True)
    class Config:
        def build(self, backbone, context):
            return kind(backbone, **options)

    return Config()


def run(method, beton, **changes):
    return Run(
        method=method,
        backbone=Backbone("resnet10", stem="cifar", width=8),
        data=Data(train=str(beton), views=views.simclr(16)),
        optim=Optim(batch=8, steps=1),
        log=Log(tensorboard=False),
        **changes,
    )


def step(method):
    """Its first step, without DeepSpeed: forward and loss as the engine calls them."""
    r = run(method, "x.beton")
    torch.manual_seed(0)
    m = prepare(method.build(backbones.build(r.backbone), Context(8, 8)), r, torch.device("cpu"))
    index = torch.arange(4)
    batch = loader.Batch(None, None, index, index, 0, 0)
    return m.loss(m([torch.randn(4, 3, 16, 16)] * 2, batch), batch)


def test_a_complete_method_passes():
    method = made()
    contract.check_method(method.build(nn.Identity(), Context(8, 8)), method)
    assert step(method)["loss"].requires_grad


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("mean_loss", "yes", "Bad.mean_loss='yes' must be True"),
        ("total_weight", lambda self: 1, "Bad.total_weight is called as <lambda>(batch) and is written as <lambda>()"),
    ],
)
def test_a_mean_loss_declared_wrongly_is_refused(name, value, message):
    with pytest.raises(ValueError) as error:
        contract.check_method(type("Bad", (Small,), {name: value})(nn.Identity()), made())
    assert message in str(error.value)


@pytest.mark.parametrize(
    "missing, message",
    [
        ("loss", "Bad has no loss (loss(out, batch) -> dict with 'loss')"),
        ("after_step", "has no after_step"),
        ("views", "has no views (the number of views, or None for any)"),
        ("forward", "has no forward (forward(views, batch) -> dict of tensors with a row for each sample)"),
    ],
)
def test_a_method_without_a_part_is_refused(missing, message):
    parts = {name: value for name, value in vars(Small).items() if name not in ("__dict__", "__weakref__", missing)}
    parts["__init__"] = lambda self, backbone: (nn.Module.__init__(self), setattr(self, "backbone", backbone))[0]
    bad = type("Bad", (nn.Module,), parts)(nn.Identity())
    with pytest.raises(ValueError) as error:
        contract.check_method(bad, made())
    assert message in str(error.value) and "docs/extending.md" in str(error.value)
    with pytest.raises(ValueError, match=r"Config.build\(...\) returned NoneType, not an nn.Module"):
        contract.check_method(None, made())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"out": lambda z: z}, "Small.forward returned Tensor: it must return a dict of tensors"),
        ({"out": lambda z: {"z": z}}, 'returned z without "features"'),
        ({"out": lambda z: {"z": [z], "features": z[:, 0]}}, "returned 'z' of type list"),
        (
            {"out": lambda z: {"z": z.flatten(0, 1), "features": z[:, 0]}},
            "'z' of shape (8, 64) for 4 samples: the first",
        ),
        ({"out": lambda z: {"z": z.sum(), "features": z[:, 0]}}, "of shape () for 4 samples"),
        ({"losses": lambda z: z.mean()}, 'Small.loss returned Tensor: it must return a dict with "loss"'),
        ({"losses": lambda z: {"total": z.mean()}}, "returned a dict of total: it must"),
        ({"losses": lambda z: {"loss": z}}, 'a tensor of shape (4, 2, 64) as "loss": it must be one number'),
        ({"losses": lambda z: {"loss": 1.0}}, 'returned float as "loss"'),
        ({"losses": lambda z: {"loss": z.detach().mean()}}, "without a gradient"),
    ],
)
def test_wrong_outputs_and_losses_are_named(options, message):
    with pytest.raises(ValueError) as error:
        step(made(**options))
    assert message in str(error.value)


def test_functions_that_take_other_arguments_are_named(beton):
    class Fewer(Small):
        def loss(self, out):
            return {}

    with pytest.raises(ValueError, match=r"Fewer.loss is called as loss\(out, batch\) and is written as loss\(out\)"):
        contract.check_method(Fewer(nn.Identity()), made())

    @dataclasses.dataclass
    class Narrow:
        def build(self, backbone): ...

    with pytest.raises(ValueError, match=r"Narrow.build is called as build\(backbone, context\) and is written as"):
        engine.build(run(Narrow(), "no.beton"), device="cpu")

    @dataclasses.dataclass
    class Older:
        def build(self, backbone, samples, **_): ...

    with pytest.raises(
        ValueError, match=r"Older.build takes samples .* build\(self, backbone, context\) and read conte"
    ):
        engine.build(run(Older(), "no.beton"), device="cpu")

    class Late(hooks.Hook):
        def after_step(self, t): ...

    with pytest.raises(ValueError, match=r"Late.after_step is called as after_step\(t, out, batch\) and is written"):
        contract.check_hook(Late())
    for name in methods.names():
        config = importlib.import_module(f"fastssl.methods.{name}").Config()
        contract.check_config(config)


def test_a_hook_without_all_three_methods_is_refused():
    class Quiet(hooks.Hook):
        def after_epoch(self, t):
            return "seen"

    quiet = contract.check_hook(Quiet())
    assert (quiet.before_epoch(0), quiet.after_step(0, {}, None), quiet.after_epoch(0)) == (None, None, "seen")

    class Bare:
        def after_step(self, t, out, batch): ...

    with pytest.raises(ValueError, match="the hook Bare has no before_epoch and no after_epoch: derive it from"):
        contract.check_hook(Bare())
    with pytest.raises(ValueError, match=r"Quiet is a class: give an instance, Quiet\(\)"):
        contract.check_hook(Quiet)

    class Misspelt(hooks.Hook):
        def after_epochs(self, t): ...

    with pytest.raises(ValueError, match="has a method 'after_epochs' that nothing calls; did you mean 'after_epoch'?"):
        contract.check_hook(Misspelt())
    quiet.capturable = "yes"
    with pytest.raises(ValueError, match="Quiet.capturable='yes' must be True"):
        contract.check_hook(quiet)
    for hook in hooks.from_config(Run(method=simclr.Config(), log=Log(knn_epochs=1, probe=True))):
        contract.check_hook(hook)
    with pytest.raises(ValueError, match="the hook Bare has no before_epoch"):  # before a file is opened
        engine.build(run(simclr.Config(), "no.beton", hooks=(Bare(),)), device="cpu")


@pytest.mark.parametrize("name", ["lr", "loss_scale", "applied", "step", "epoch", "mfu", "views_ms", "images_per_s"])
def test_a_loss_with_a_name_of_the_trainer_is_refused_at_its_first_step(name):
    with pytest.raises(ValueError, match=f"Small.loss returned '{name}', which the trainer logs, too: give it another"):
        step(made(losses=lambda z: {"loss": z.square().mean(), name: z.mean()}))


def test_a_hook_that_logs_by_a_name_that_is_taken_is_refused():
    class Logs(hooks.Hook):
        def __init__(self, *scalars):
            self.scalars = scalars

        def after_epoch(self, t):
            for scalars in self.scalars:
                t.log(scalars)

    t = bare_trainer()
    t.scalars = {"loss": torch.tensor(1.0), "lr": 0.1, "applied": True}
    t.hooks = [Logs({"a": 1.0}, {"a": 2.0}), Logs({"b": 1.0})]  # a hook may log a number again
    for hook in t.hooks:
        contract.call_hook(hook, "after_epoch", t)
    assert t.scalars["a"] == 2.0 and t.scalars["b"] == 1.0
    for name, owner in (("loss", "the method"), ("a", "the method or another hook"), ("lr", "the trainer")):
        with pytest.raises(ValueError, match=f"the hook Logs has logged '{name}', which {owner}"):
            contract.call_hook(Logs({name: 3.0}), "after_epoch", t)
    t.hooks = [Logs({"c": 1.0}), Logs({"c": 2.0})]
    with pytest.raises(ValueError, match="the hook Logs has logged 'c'"):
        engine.end_epoch(t, None)


def test_fit_uses_the_monitors_named_in_run_log(monkeypatch):
    seen = []

    def build(run, hooks, device, loader):
        seen.append([type(h).__name__ for h in hooks])
        raise InterruptedError

    monkeypatch.setattr(engine, "build", build)
    r = run(simclr.Config(dims=(8, 8)), "x.beton", name="a")
    r.log.knn_epochs, r.log.probe, r.log.root = 1, True, "/nowhere"
    for more in ((), ([],)):
        with pytest.raises(InterruptedError):
            engine.fit(r, *more, device="cpu")
    assert seen == [["KnnMonitor", "LinearProbe", "Collapse"], []]


def test_one_image_in_a_contrastive_batch_warns(beton):
    method, source = simclr.Config(dims=(8, 8)), loader.Loader(beton, 8, device="cpu", workers=1)
    few, more = run(method, beton), run(method, beton)
    few.optim.batch, more.optim.batch = 1, 2
    with pytest.warns(UserWarning, match="optim.batch=1: the loss of SimCLR compares the images of a batch"):
        build_method(few, source)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_method(more, source)


@pytest.mark.parametrize(
    "name, command",
    [
        (
            "photos",
            "photos is a folder, and a .beton file is needed: `fastssl convert imagefolder {0}/photos photos.bet",
        ),
        ("photos.tar.gz", "photos.tar.gz is a .gz file, and a .beton file is needed: `fastssl convert tar"),
        ("list.txt", "`fastssl convert list {0}/list.txt list.beton` makes one"),
    ],
)
def test_a_folder_or_an_archive_as_data_raises_with_the_convert_command(tmp_path, name, command):
    path = tmp_path / name
    path.mkdir() if "." not in name else path.write_text("x")
    with pytest.raises(ValueError) as error:
        loader.Loader(path, 8)
    assert command.format(tmp_path) in str(error.value)


def test_views_that_a_network_cannot_take_are_refused_before_data_is_read():
    r = run(simclr.Config(), "no.beton")
    r.backbone = Backbone("vit_tiny_patch16_224")
    r.data.views = views.swav(32, small=24, small_crops=1)
    with pytest.raises(ValueError, match="views of 24 pixels: vit_tiny_patch16_224 needs multiples of 16"):
        engine.build(r, device="cpu")
    backbones.check_sizes(r.backbone, [32, 48, 224])
    backbones.check_sizes(Backbone("resnet10"), [1, 33])
    fixed = Backbone("mixer_s16_224")
    backbones.check_sizes(fixed, [224])
    with pytest.raises(ValueError, match="views of 96 pixels: mixer_s16_224 does not accept this size"):
        backbones.check_sizes(fixed, [96])
    levit = Backbone("levit_128s")  # which has no check of its own
    backbones.check_sizes(levit, [224])
    with pytest.raises(ValueError, match="views of 96 pixels: levit_128s does not accept this size"):
        backbones.check_sizes(levit, [96])
    r.data.views = views.simclr(32)
    r.data.eval_view = views.center(40)[0]
    with pytest.raises(ValueError, match="views of 40 pixels"):
        engine.build(r, device="cpu")


def test_a_run_made_in_python_is_checked_and_named():
    r = run(simclr.Config(), "no.beton")
    r.optim.lrr = 3
    with pytest.raises(ValueError, match="optim.lrr: unknown setting 'lrr'; did you mean 'lr'"):
        engine.build(r, device="cpu")
    del r.optim.lrr
    config.validate(r)
    assert r.name == "simclr/resnet10_no"
