"""Ranks, micro-batches and ZeRO stages give the loss and the gradients of one rank with one batch."""

import itertools
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import ranks

STEPS, BATCH = 3, 32
RUNS = {  # name: (method, world, micro-batches, ZeRO stage, optimizer)
    "simclr 1x1": ("simclr", 1, 1, 0, "sgd"),
    "simclr 1x4": ("simclr", 1, 4, 0, "sgd"),
    "simclr 2x1": ("simclr", 2, 1, 0, "sgd"),
    "simclr 2x2": ("simclr", 2, 2, 0, "sgd"),
    "moco 1x1": ("moco", 1, 1, 0, "sgd"),
    "moco 1x4": ("moco", 1, 4, 0, "sgd"),
    "moco 2x1": ("moco", 2, 1, 0, "sgd"),
    "moco 2x2": ("moco", 2, 2, 0, "sgd"),
    "simclr lars 1x1": ("simclr", 1, 1, 0, "lars"),
    **{f"simclr lars zero{z}": ("simclr", 2, 2, z, "lars") for z in range(4)},
    **{f"moco zero{z}": ("moco", 2, 2, z, "sgd") for z in (1, 2, 3)},
}


def make_run(beton: str, method: str, micro: int | None, zero: int, optimizer: str):
    from fastssl import views
    from fastssl.config import Backbone, Data, Log, Optim, Run, Speed
    from fastssl.methods import moco, simclr

    method = {"simclr": simclr.Config(temperature=0.5, dims=(32, 16), norm=False),
              "moco": moco.Config(temperature=0.5, dims=(32, 16), queue=96, momentum=0.9)}[method]
    return Run(method=method, backbone=Backbone("resnet10", stem="cifar", norm="gn", width=8),
               data=Data(train=beton, views=views.simclr(16)),
               optim=Optim(name=optimizer, lr=0.1 if optimizer == "sgd" else 2.0, batch=BATCH, epochs=1,
                           weight_decay=1e-4, steps=STEPS, schedule="constant"),
               speed=Speed(zero=zero, micro_batch=micro, workers=1), log=Log(tensorboard=False), seed=3)


def record(t) -> dict:
    """Losses of STEPS steps, the gradients of the first, and the state after the last."""
    from fastssl import dist, engine, state
    from fastssl.meters import Meter

    meter, losses, grads = Meter(t.device, batch=BATCH), [], {}
    count = BATCH // dist.world() // engine.micro_batch(t.run)
    step = t.scale.step

    def spy(ds):
        if not grads and t.run.speed.zero == 0:
            grads.update({n: p.grad.clone() for n, p in t.method.named_parameters() if p.grad is not None})
        return step(ds)

    t.scale.step = spy
    source = t.loader.epoch(0)
    for _ in range(STEPS):
        t.schedule.set_lr(t.ds.optimizer, t.step)
        out, batch, _ = engine.train_step(t, list(itertools.islice(source, count)), meter)
        t.step += 1
        t.method.after_step(out, batch, t.step / t.total_steps)
        losses.append(dist.mean(t.scalars["loss"]).item())
    return {"losses": losses, "grads": grads, "state": state.whole(t.method)}


def worker(out: str, beton: str) -> None:
    from fastssl import dist, engine

    dist.init("cpu")
    results = {}
    for name, (method, world, micro, zero, optimizer) in RUNS.items():
        if world != dist.world():
            continue
        run = make_run(beton, method, BATCH // world // micro, zero, optimizer)
        results[name] = record(engine.build(run, device="cpu"))
    if dist.is_main():
        torch.save(results, out)
    dist.shutdown()


@pytest.fixture(scope="module")
def results(tmp_path_factory, beton):
    folder = tmp_path_factory.mktemp("engine")
    return {**ranks.launch(__file__, 1, folder / "one.pt", str(beton)),
            **ranks.launch(__file__, 2, folder / "two.pt", str(beton))}


def reference(name: str) -> str:
    return {"moco": "moco 1x1"}.get(name.split()[0], "simclr lars 1x1" if "lars" in name else "simclr 1x1")


@pytest.mark.parametrize("name", [n for n in RUNS if not n.endswith("1x1")])
def test_loss_and_every_gradient_are_those_of_one_rank(results, name):
    got, want = results[name], results[reference(name)]
    assert want["losses"][0] > 0.5 and len(set(want["losses"])) == STEPS
    torch.testing.assert_close(got["losses"], want["losses"], rtol=0, atol=1e-6)
    if RUNS[name][3] == 0:
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
        assert got["pointer"].item() == STEPS * BATCH % 96


def test_running_statistics_move_once_per_step():
    """By the mean of the micro-batches' statistics, whatever their number; the first pass leaves no trace."""
    from fastssl.engine import RunningStatistics

    torch.manual_seed(0)
    norm, x = torch.nn.BatchNorm1d(5), torch.randn(24, 5).double()
    norm.double()
    wanted = norm.running_mean.lerp(x.mean(0), 0.1), norm.running_var.lerp(
        torch.stack([c.var(0) for c in x.chunk(3)]).mean(0), 0.1)
    statistics = RunningStatistics(norm)
    for chunk in x.chunk(3):
        with statistics.frozen():
            norm(chunk)
    assert torch.equal(norm.running_mean, torch.zeros(5).double())
    for i, chunk in enumerate(x.chunk(3)):
        with statistics.shared(i, 3):
            norm(chunk)
    statistics.count_once()
    torch.testing.assert_close(norm.running_mean, wanted[0], rtol=0, atol=1e-14)
    torch.testing.assert_close(norm.running_var, wanted[1], rtol=0, atol=1e-14)
    assert norm.num_batches_tracked == 1 and norm.momentum == 0.1


if __name__ == "__main__":
    ranks.main(worker)
