"""Ranks, micro-batches and ZeRO stages give the loss and the gradients of one rank with one batch."""

import copy
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import ranks

STEPS, BATCH = 3, 32
RUNS = {  # name: (method, world, micro-batches, optimizer, more of Speed)
    "simclr 1x1": ("simclr", 1, 1, "sgd", {}),
    "simclr 1x4": ("simclr", 1, 4, "sgd", {}),
    "simclr 2x1": ("simclr", 2, 1, "sgd", {}),
    "simclr 2x2": ("simclr", 2, 2, "sgd", {"resident": True}),
    "moco 1x1": ("moco", 1, 1, "sgd", {}),
    "moco 1x4": ("moco", 1, 4, "sgd", {}),
    "moco 2x1": ("moco", 2, 1, "sgd", {}),
    "moco 2x2": ("moco", 2, 2, "sgd", {}),
    "simclr lars 1x1": ("simclr", 1, 1, "lars", {}),
    **{f"simclr lars zero{z}": ("simclr", 2, 2, "lars", {"zero": z}) for z in range(4)},
    **{f"moco zero{z}": ("moco", 2, 2, "sgd", {"zero": z}) for z in (1, 2, 3)},
}
SWITCHES = {  # Speed must not change results
    "plain": {"channels_last": False, "kernels": "reference"},
    "fast": {"channels_last": True, "compile": "on", "resident": True, "workers": 2},
}


def make_run(beton: str, method: str, micro: int, optimizer: str, speed: dict, precision: str = "fp32"):
    from fastssl import views
    from fastssl.config import Backbone, Data, Log, Optim, Run, Speed
    from fastssl.methods import moco, simclr

    method = {
        "simclr": simclr.Config(temperature=0.5, dims=(32, 16), norm=False),
        "moco": moco.Config(temperature=0.5, dims=(32, 16), queue=96, momentum=0.9),
    }[method]
    return Run(
        method=method,
        backbone=Backbone("resnet10", stem="cifar", norm="gn", width=8),
        data=Data(train=beton, views=views.simclr(16)),
        optim=Optim(
            name=optimizer,
            lr=0.1 if optimizer == "sgd" else 2.0,
            batch=BATCH,
            epochs=1,
            weight_decay=1e-4,
            steps=STEPS,
            schedule="constant",
            precision=precision,
        ),
        speed=Speed(**{"workers": 1, "micro_batch": micro, **speed}),
        log=Log(tensorboard=False),
        seed=5,  # with 3 an activation is so near 0 that rounding decides whether ReLU passes its gradient
    )


def record(t) -> dict:
    """Losses of STEPS steps, the gradients of the first, and the state after the last."""
    from fastssl import backbones, dist, engine
    from fastssl.step import step
    from fastssl.zero import full_state_dict

    losses, grads, update = [], {}, t.deepspeed.optimizer.step

    def spy():
        if not grads and t.run.speed.zero == 0:  # elsewhere gradients are gone by then
            grads.update({n: p.grad.clone() for n, p in t.method.named_parameters() if p.grad is not None})
            for n, m in t.method.named_modules():
                if isinstance(m, backbones.Conv2d) and f"{n}.weight" in grads:  # stored as OHWI
                    grads[f"{n}.weight"] = grads[f"{n}.weight"].permute(0, 3, 1, 2)
        return update()

    t.deepspeed.optimizer.step = spy
    for _, micro_batches in engine.batches(t):
        step(t, micro_batches)
        losses.append(dist.mean(t.scalars["loss"]).item())
    return {"losses": losses, "grads": grads, "state": full_state_dict(t.method)}


def normalised() -> dict:
    """Output, gradients and statistics of batch norm over all ranks in fp64: this rank's share, gathered."""
    from fastssl import dist
    from fastssl.norm import convert_sync_bn

    torch.manual_seed(0)
    x, up = torch.randn(2, 12, 5, 3, 3, dtype=torch.float64).unbind()
    mine = x.chunk(dist.world())[dist.rank()].clone().requires_grad_()
    norm = torch.nn.BatchNorm2d(5).double()
    torch.nn.init.uniform_(norm.weight)
    norm = convert_sync_bn(norm, torch.device("cpu"))
    y = norm(mine)
    (y * up.chunk(dist.world())[dist.rank()]).sum().backward()
    return {
        "y": dist.gather(y.detach()),
        "x": dist.gather(mine.grad),
        "weight": dist.sum_(norm.weight.grad),
        "bias": dist.sum_(norm.bias.grad),
        **dict(norm.named_buffers()),
    }


def overflow(t) -> list[dict]:
    """Three steps in fp16, the second with a loss scale that overflows: what each did to weights, queue and scale."""
    from fastssl import engine
    from fastssl.step import step
    from fastssl.zero import full_state_dict

    done = []
    for _, micro_batches in engine.batches(t):
        if t.step == 1:
            t.loss_scaler.value = 2.0**60
        before, scale = full_state_dict(t.method, everywhere=True), t.loss_scaler.value
        step(t, micro_batches)
        applied, now = bool(t.scalars["applied"]), float(t.scalars["loss_scale"])
        if not applied:
            t.loss_scaler.value = 2.0**10
        after = full_state_dict(t.method, everywhere=True)
        moved = {k for k in after if not torch.equal(before[k], after[k])}
        done.append(
            {
                "applied": applied,
                "moved": moved,
                "scale": now / scale,
                "finite": all(v.isfinite().all() for v in after.values()),
                "loss": t.scalars["loss"].item(),
            }
        )
    return done


def worker(out: str, beton: str) -> None:
    from fastssl import dist, engine

    dist.init("cpu")
    results = {}
    for name, (method, world, micro, optimizer, speed) in RUNS.items():
        if world == dist.world():
            run = make_run(beton, method, BATCH // world // micro, optimizer, speed)
            results[name] = record(engine.build(run, device="cpu"))
    if dist.world() == 1:
        for name, speed in SWITCHES.items():
            results[name] = record(engine.build(make_run(beton, "simclr", BATCH, "sgd", speed), device="cpu"))
    results[f"norm {dist.world()}"] = normalised()
    if dist.world() == 2:
        for zero in range(4):
            run = make_run(beton, "moco", BATCH // 4, "sgd", {"zero": zero}, "fp16")
            results[f"fp16 zero{zero}"] = overflow(engine.build(run, device="cpu"))
    if dist.is_main():
        torch.save(results, out)
    dist.shutdown()


@pytest.fixture(scope="module")
def results(tmp_path_factory, beton):
    folder = tmp_path_factory.mktemp("engine")
    return {
        **ranks.launch(__file__, 1, folder / "one.pt", str(beton)),
        **ranks.launch(__file__, 2, folder / "two.pt", str(beton)),
    }


def reference(name: str) -> str:
    return "simclr lars 1x1" if "lars" in name else f"{name.split()[0]} 1x1"


@pytest.mark.parametrize("name", [n for n in RUNS if not n.endswith("1x1")])
def test_loss_and_every_gradient_are_those_of_one_rank(results, name):
    got, want = results[name], results[reference(name)]
    assert want["losses"][0] > 0.5 and len(set(want["losses"])) == STEPS
    torch.testing.assert_close(got["losses"], want["losses"], rtol=0, atol=1e-6)
    if not RUNS[name][4].get("zero"):
        assert got["grads"].keys() == want["grads"].keys() and len(got["grads"]) > 10
    for key, value in got["grads"].items():
        assert want["grads"][key].abs().max() > 1e-6, f"{key} has no gradient: the comparison would be empty"
        torch.testing.assert_close(value, want["grads"][key], rtol=0, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", [n for n in RUNS if not n.endswith("1x1")])
def test_weights_queue_and_momentum_encoder_agree_after_the_last_step(results, name):
    got, want = results[name]["state"], results[reference(name)]["state"]
    assert got.keys() == want.keys()
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=0, atol=2e-6, msg=lambda m, k=key: f"{k}: {m}")
    if "moco" in name:
        assert got["pointers"].item() == STEPS * BATCH % 96


def test_speed_switches_do_not_change_the_loss_curve(results):
    plain, fast = results["plain"], results["fast"]
    torch.testing.assert_close(fast["losses"], plain["losses"], rtol=0, atol=1e-5)
    for key, value in plain["grads"].items():
        torch.testing.assert_close(fast["grads"][key], value, rtol=0, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


def test_synchronised_batch_norm_is_batch_norm_of_the_global_batch(results):
    for key, value in results["norm 1"].items():
        torch.testing.assert_close(results["norm 2"][key], value, rtol=0, atol=1e-12, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("zero", range(4))
def test_an_overflow_skips_the_step_and_everything_that_moves_with_it(results, zero):
    good, skipped, better = results[f"fp16 zero{zero}"]
    assert (good["applied"], skipped["applied"], better["applied"]) == (True, False, True)
    assert (good["scale"], skipped["scale"], better["scale"]) == (1, 0.5, 1)
    assert not skipped["moved"], "fp16 overflowed and yet these moved"
    assert {"queue", "pointers", "backbone.conv1.weight", "target.0.conv1.weight"} <= good["moved"] & better["moved"]
    assert better["finite"] and 0.5 < better["loss"] < 10


def assert_equal(a, b):
    torch.testing.assert_close(dict(a.state_dict()), dict(b.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_move_once_per_step(momentum):
    """By the mean of what each micro-batch, of two views, would move them; the first pass leaves no trace, and a module
    in evaluation mode no rounding."""
    from fastssl.norm import SavedStatistics

    torch.manual_seed(0)
    net = torch.nn.ModuleList([torch.nn.BatchNorm1d(5, momentum=momentum) for _ in range(2)]).double()
    for norm in net:
        norm(torch.randn(9, 5).double() + 2)
    net[1].eval()
    before, x = copy.deepcopy(net), torch.randn(3, 2, 8, 5).double()
    alone = [copy.deepcopy(net[0]) for _ in x]
    for norm, views in zip(alone, x):
        norm(views[0]), norm(views[1])
    statistics = SavedStatistics(net)
    for views in x:
        [norm(v) for norm in net for v in views]
    statistics.restore()
    assert_equal(net, before)
    for views in x:
        sum(norm(v.requires_grad_()).sum() for norm in net for v in views).backward()
        statistics.add()
    statistics.apply_mean(len(x))
    for name in ("running_mean", "running_var"):
        wanted = torch.stack([getattr(norm, name) for norm in alone]).mean(0)
        torch.testing.assert_close(getattr(net[0], name), wanted, rtol=0, atol=1e-14)
    assert net[0].num_batches_tracked == 3 and net[0].momentum == momentum
    assert_equal(net[1], before[1])


def test_micro_batches_need_no_compilation_of_their_own():
    """Dynamo gives a function up that it has compiled eight times."""
    from torch._dynamo.testing import CompileCounter

    from fastssl.norm import SavedStatistics

    net, counter = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)), CompileCounter()
    forward = torch.compile(net, backend=counter)
    for _ in range(2):
        statistics = SavedStatistics(net)
        for _ in range(9):
            with torch.no_grad():
                forward(torch.randn(6, 4))
        statistics.restore()
        for _ in range(9):
            forward(torch.randn(6, 4)).sum().backward()
            statistics.add()
        statistics.apply_mean(9)
    assert counter.frame_count <= 2  # without and with gradients


if __name__ == "__main__":
    ranks.main(worker)
