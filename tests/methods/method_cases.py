"""Small configurations of every method, and a loader of images in memory, for the tests in this folder.

Batch norm in a head normalises over the samples of all ranks (sync_bn), but of one micro-batch only.  Ranks are
therefore compared with batch norm, micro-batches without.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from fastssl import dist, views
from fastssl.config import Backbone, Data, Log, Optim, Run, Speed
from fastssl.files.datacard import DataCard
from fastssl.loader import Batch
from fastssl.sampler import Sampler

if TYPE_CHECKING:
    from fastssl.trainer import Trainer

SAMPLES, SIDE, CLASSES = 72, 20, 5
PLAIN = Backbone("resnet10", stem="cifar", norm="gn", width=8)
VIT = Backbone("test_vit")


@dataclass
class Case:
    settings: dict = field(default_factory=dict)
    views: tuple = views.simclr(16)
    backbone: Backbone = field(default_factory=lambda: PLAIN)
    norm: bool = False  # its Config has `norm`, batch norm in the heads
    module: str = ""  # in fastssl.methods; default: the name of the case


CROPS = views.swav(16, small=8, small_crops=2)
CASES = {
    "simclr": Case({"dims": (24, 12), "temperature": 0.5}, norm=True),
    "moco": Case({"dims": (24, 12), "queue": 48, "momentum": 0.9}),
    "moco symmetric": Case({"dims": (24, 12), "queue": 48, "momentum": 0.9, "symmetric": True}, module="moco"),
    "byol": Case({"dims": (24, 12), "predictor_dim": 24, "momentum": 0.9}, norm=True),
    "simsiam": Case({"dims": (24, 24, 12), "predictor_dim": 8}, norm=True),
    "mocov3": Case({"dims": (24, 12), "predictor_dim": 24, "momentum": 0.9}, norm=True),
    "mocov3 vit": Case(
        {
            "dims": (24, 12),
            "predictor_dim": 24,
            "momentum": 0.9,
            "predictor_norm": True,
            "freeze_patch_embed": True,
            "temperature": 0.2,
        },
        views.byol(32),
        VIT,
        True,
        "mocov3",
    ),
    "barlow": Case({"dims": (24, 24, 12), "scale": 0.1}, norm=True),
    "vicreg": Case({"dims": (24, 24, 12), "invariance": 1.0, "variance": 1.0, "covariance": 0.04}, norm=True),
    "vicreg wide": Case(
        {"dims": (24, 24, 40), "invariance": 1.0, "variance": 1.0, "covariance": 0.04}, norm=True, module="vicreg"
    ),  # more features than a batch of 16 has samples
    "nnclr": Case({"dims": (24, 24, 12), "predictor_dim": 24, "queue": 48, "temperature": 0.5}, norm=True),
    "dino": Case({"dims": (24, 12), "prototypes": 20, "freeze_epochs": 0, "momentum": 0.9}, CROPS, norm=True),
    "swav": Case({"dims": (24, 12), "prototypes": 10, "freeze_epochs": 0}, CROPS, norm=True),
    "swav queue": Case(
        {"dims": (24, 12), "prototypes": 10, "freeze_epochs": 0, "queue": 32, "queue_epoch": 0},
        CROPS,
        norm=True,
        module="swav",
    ),
    "supcon": Case({"dims": (24, 12), "temperature": 0.5}, norm=True),
    "dcl": Case({"dims": (24, 12), "temperature": 0.5}, norm=True),
    "densecl": Case({"dims": (24, 12), "queue": 48, "momentum": 0.9}, views.moco_v2(32)),
    "supervised": Case({}, views.supervised(16)),
    "mae": Case(
        {"mask_ratio": 0.5, "decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}, views.supervised(32), VIT
    ),
    "lejepa": Case({"dims": (24, 24, 12), "directions": 16}, CROPS, norm=True),
    "rotation": Case({}, views.rotation(16)),
    "npid": Case({"dims": (12,), "negatives": 30, "temperature": 0.3, "ensure_neg": True}, views.npid(16)),
    "npid shared": Case(
        {"dims": (12,), "negatives": 30, "temperature": 0.3, "ensure_neg": True, "shared": True},
        views.npid(16),
        module="npid",
    ),
    "deepcluster": Case({"clusters": 6, "pca_dim": 8}, views.deepcluster(16)),
    "deepcluster pic": Case(
        {"clusters": 30, "pca_dim": 8, "algorithm": "pic", "sampling": "all", "reweight": 0.5},
        views.deepcluster(16),
        module="deepcluster",
    ),
    "odc": Case(
        {"clusters": 6, "dims": (24, 12), "min_cluster_size": 6, "centroid_interval": 2, "dropout": 0.0},
        views.deepcluster(16),
        norm=True,
    ),
    "deepclusterv2": Case({"dims": (24, 12), "clusters": (6, 9, 4)}, CROPS, norm=True),
    "relative_loc": Case({"hidden": 24, "dropout": 0.0}, views.patches(5, resize=18, window=18), norm=True),
}


def config(name: str, **changes):
    case = CASES[name]
    return importlib.import_module(f"fastssl.methods.{case.module or name}").Config(**{**case.settings, **changes})


def run(
    name: str,
    *,
    norm: bool = False,
    batch: int = 16,
    micro: int | None = None,
    zero: int = 0,
    steps: int = 2,
    **changes,
) -> Run:
    case = CASES[name]
    method = config(name, norm=norm, **changes) if case.norm else config(name, **changes)
    return Run(
        method=method,
        backbone=case.backbone,
        data=Data(train="memory", views=case.views),
        seed=3,
        sync_bn=True,
        optim=Optim(lr=0.05, batch=batch, epochs=1, steps=steps, weight_decay=1e-4, schedule="constant"),
        speed=Speed(zero=zero, micro_batch=micro, workers=1),
        log=Log(tensorboard=False),
        deepspeed={"zero_optimization": {"reduce_scatter": False}},
    )  # with it ZeRO 3 refuses float64


def loader(run: Run, device: str = "cpu") -> Memory:
    """A loader for `run`, as argument of `engine.build` and `engine.fit`."""
    from fastssl.build import micro_batch

    micro = run.optim.batch // dist.world() // micro_batch(run)
    return Memory(run.data.train, run.optim.batch, Sampler(run.seed, micro), device=device)


def build(run: Run, device: str = "cpu") -> Trainer:
    """The trainer of `run` on images in memory."""
    from fastssl.build import build

    return build(run, device=device, loader=loader(run, device))


class Memory:
    """fastssl.loader.Loader for images in memory, without FFCV: the same order, shards and micro-batches."""

    def __init__(self, path, batch, sampler=None, *, device=None):
        g = torch.Generator().manual_seed(7)
        small = torch.randint(0, 256, (SAMPLES, 3, 4, 4), generator=g).float()
        images = torch.nn.functional.interpolate(small, size=SIDE, mode="bicubic").clamp(0, 255)
        self.pixels = images.permute(0, 2, 3, 1).contiguous().flatten(1, 2).to(torch.uint8)
        self.labels = torch.randint(-1, CLASSES, (SAMPLES,), generator=g)
        self.samples, self.classes = SAMPLES, [str(i) for i in range(CLASSES)]
        self.card = DataCard(samples=SAMPLES, bytes=0, max_pixels=SIDE**2, label="int")
        self.batch, self.sampler, self.device = batch, sampler or Sampler(), device
        self.steps = self.sampler.steps(batch, SAMPLES)

    def in_file_order(self):
        world, micro = self.sampler.world, self.sampler.micro_per_step
        sampler = Sampler.sequential(seed=self.sampler.seed)
        return Memory(None, self.batch // world // micro * world, sampler, device=self.device)

    def epoch(self, epoch, start=0, order=None):
        for step, position, rows in self.sampler.micro_batches(self.batch, SAMPLES, epoch, start, order):
            index, sizes = torch.from_numpy(rows), torch.full((len(rows), 2), SIDE, dtype=torch.int32)
            tensors = self.pixels[index], sizes, index, self.labels[index]
            tensors = [x.to(self.device or "cpu") for x in tensors]
            yield Batch(*tensors, epoch, step, None if order is None else position)
