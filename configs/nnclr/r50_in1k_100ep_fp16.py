"""NNCLR, ResNet-50, ImageNet, batch 4096, 100 epochs, fp16.

Follows clane9/vissl's config, which is written after the paper, for 100 of 1000 epochs. We found no code by the
authors.

    deepspeed --num_gpus 8 fastssl/train.py configs/nnclr/r50_in1k_100ep_fp16.py

Published: none for 100 epochs (linear 75.6 top-1 at best: the paper's abstract).
fastssl: not measured yet.
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run, Speed
from fastssl.methods import nnclr


def get_config() -> Run:
    return Run(
        method=nnclr.Config(temperature=0.1, dims=(2048, 2048, 256), queue=98304),
        backbone=Backbone("resnet50"),
        data=Data(train="data/in1k_train.beton", test="data/in1k_val.beton", views=views.byol(224)),
        optim=Optim(
            name="lars",
            lr=0.3,
            batch=4096,
            epochs=100,
            weight_decay=1e-6,
            base_batch=256,
            warmup_epochs=10,
            warmup_ratio=0.0,
            paramwise={"ndim<=1": {"weight_decay": 0.0, "lars_exclude": True}},
            precision="fp16",
        ),
        speed=Speed(micro_batch=256),
        log=Log(knn_epochs=20, probe=True),
        sync_bn=True,
    )
