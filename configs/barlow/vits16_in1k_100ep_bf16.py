"""Barlow Twins, ViT-S/16, ImageNet, batch 256, 100 epochs, bf16.

For comparing speed: rbalestr-lab/stable-pretraining publishes a speed for this method, network, image size and batch.
The settings are ours, not a published recipe.

    deepspeed --num_gpus 1 fastssl/train.py configs/barlow/vits16_in1k_100ep_bf16.py

Published: none; only a speed, 870.9 images/s on one H200 (stable-pretraining's RESULTS.md).
fastssl: not measured yet.
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import barlow


def get_config() -> Run:
    return Run(
        method=barlow.Config(),
        backbone=Backbone("vit_small_patch16_224"),
        data=Data(train="data/in1k_train.beton", test="data/in1k_val.beton", views=views.byol(224)),
        optim=Optim(
            name="adamw",
            lr=5e-4,
            batch=256,
            epochs=100,
            warmup_epochs=10,
            weight_decay=0.05,
            precision="bf16",
            paramwise={"ndim<=1": {"weight_decay": 0.0}},
        ),
        log=Log(knn_epochs=20, probe=True),
    )
