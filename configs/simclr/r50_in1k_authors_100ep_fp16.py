"""SimCLR, ResNet-50, ImageNet, batch 4096, 100 epochs, fp16.

The authors' command for ImageNet in google-research/simclr's README (float32 on TPUs there) with the paper's weight
decay (1e-6; the README of today has 1e-4). As in their code, the rate changes at every step, LARS's norm contains the
weight decay, and the last batch norm has no shift.

    deepspeed --num_gpus 8 fastssl/train.py configs/simclr/r50_in1k_authors_100ep_fp16.py

Published: linear about 64.5 top-1 (the authors' README).
fastssl: not measured yet.
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import simclr


def get_config() -> Run:
    return Run(
        method=simclr.Config(temperature=0.1, dims=(2048, 128), last_shift=False),
        backbone=Backbone("resnet50", zero_init_residual=True),
        data=Data(
            train="data/in1k_train.beton", test="data/in1k_val.beton", views=views.simclr(224, interpolation="bicubic")
        ),
        optim=Optim(
            name="lars",
            lr=0.3,
            batch=4096,
            epochs=100,
            weight_decay=1e-6,
            base_batch=256,
            warmup_epochs=10,
            warmup_ratio=0.0,
            lars_denominator="sum",
            precision="fp16",
            paramwise={"ndim<=1": {"weight_decay": 0.0, "lars_exclude": True}},
        ),
        log=Log(knn_epochs=20, probe=True),
        sync_bn=True,
    )
