"""A run folder, labelled files and the command line for tests of `fastssl eval`.  Not a test."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import photo, write_beton, write_card

import fastssl.eval
import fastssl.report
from fastssl import backbones, config, views
from fastssl.checkpoint import disk
from fastssl.config import Backbone, Data, Run
from fastssl.methods import simclr

SPEC = Backbone("resnet10", stem="cifar", width=8)


@pytest.fixture(scope="module", name="files")
def files_fixture(tmp_path_factory):
    """Two labelled files whose classes differ in tint, with data cards."""
    folder, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    out = []
    for name, n in (("train", 60), ("test", 33)):
        labels = [i % 6 for i in range(n)]
        tint = [[100 * (y & 1), 100 * (y >> 1 & 1), 100 * (y >> 2)] for y in labels]
        images = [(photo(rng, 20, 20) // 4 + t).astype(np.uint8) for t in tint]
        path = write_beton(folder / f"{name}.beton", images, labels)
        out.append(str(write_card(path, images, list("abcdef"))))
    return out


@pytest.fixture(scope="module", name="run_folder")
def run_folder_fixture(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run = Run(
        method=simclr.Config(),
        backbone=SPEC,
        name="x",
        data=Data(train=files[0], test=files[1], views=views.simclr(16, mean=(0.4, 0.4, 0.4))),
    )
    (folder / "config.json").write_text(json.dumps(config.dump(run)))
    torch.manual_seed(3)
    temporary = disk.create(folder, 5)
    state = {"backbone." + k: v for k, v in backbones.build(SPEC).state_dict().items()} | {"projector": torch.ones(3)}
    safetensors.torch.save_file(state, temporary / "weights.safetensors")
    disk.commit(temporary, 1)
    return folder


def call(*argv):
    """The exit code."""
    argv = [*map(str, argv), "--device", "cpu", "--workers", "1"]
    try:
        code = fastssl.eval.main(argv)
    except SystemExit as stop:
        code = stop.code
    return code
