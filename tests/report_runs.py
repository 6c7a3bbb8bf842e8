"""Run folders for tests of the report.  Not a test."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import photo, write_beton, write_card

from fastssl import backbones, config, views
from fastssl.checkpoint import disk
from fastssl.config import Backbone, Data, Optim, Run
from fastssl.methods import simclr

SPEC = Backbone("resnet10", stem="cifar", width=8)
STEPS, PER_EPOCH = 60, 20


def record(step, loss):
    phases = {
        "data_ms": 1.0,
        "views_ms": 2.0,
        "forward_ms": 30.0,
        "backward_ms": 60.0,
        "optimizer_ms": 5.0,
        "other_ms": 2.0 + 100 * (step == 1),
    }
    total = sum(phases.values())
    return {
        "step": step,
        "epoch": (step - 1) // PER_EPOCH,
        "lr": 0.1,
        "loss": loss,
        "loss_scale": 1.0,
        "applied": True,
        **phases,
        "total_ms": total,
        "images_per_s": 32 / total * 1e3,
        "memory_gib": 0.5,
        "mfu": None,
    }


def lines(steps, knn=True):
    out = []
    for step in range(1, steps + 1):
        out.append(record(step, 5 / step))
        if knn and step % PER_EPOCH == 0:
            out.append({"step": step, "epoch": (step - 1) // PER_EPOCH, "knn_top1": 40.0 + step / 10})
    return [json.dumps(line) for line in out]


def write_run(folder, data, steps=STEPS, *, name="a", temperature=0.5, weights=True, tail=""):
    run = Run(
        method=simclr.Config(temperature=temperature),
        backbone=SPEC,
        name=name,
        optim=Optim(batch=32, epochs=3),
        data=Data(train=data[0], test=data[1], views=views.simclr(16)),
    )
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.dump(run)))
    (folder / "log.jsonl").write_text("\n".join(lines(steps)) + "\n" + tail)
    if weights:
        torch.manual_seed(0)
        temporary = disk.create(folder, steps)
        tensors = {"backbone." + k: v for k, v in backbones.build(SPEC).state_dict().items()}
        safetensors.torch.save_file(tensors, temporary / "weights.safetensors")
        disk.commit(temporary, 1)
    return folder


@pytest.fixture(scope="module", name="data")
def data_fixture(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    out = []
    for name, n in (("train", 24), ("test", 40)):
        images = [(photo(rng, 20, 20) // 2 + 60 * (i % 3)).astype(np.uint8) for i in range(n)]
        path = write_beton(folder / f"{name}.beton", images, [i % 3 for i in range(n)])
        out.append(str(write_card(path, images, ["red", "green", "blue"]) if name == "train" else path))
    return out
