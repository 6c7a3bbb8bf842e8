"""BYOL, ResNet-50, ImageNet, batch 4096 as 8 x 16 x 32, 300 epochs.

OpenSelfSup's recipe, not the authors' (r50_in1k_bs4096_300ep_bf16.py).

    deepspeed --num_gpus 8 fastssl/train.py configs/byol/r50_in1k_bs4096_accumulate16_300ep.py

Published: linear 72.35 top-1 on the last stage, VOC07 SVM 86.58 mAP (OpenSelfSup's MODEL_ZOO.md).
fastssl: not measured yet.
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run, Speed
from fastssl.methods import byol


def get_config() -> Run:
    return Run(
        method=byol.Config(dims=(4096, 256), momentum=0.99, init="openselfsup"),
        backbone=Backbone("resnet50", init="fan_in"),
        data=Data(train="data/in1k_train.beton", test="data/in1k_val.beton", views=views.byol(224)),
        optim=Optim(
            name="lars",
            lr=4.8,
            batch=4096,
            epochs=300,
            weight_decay=1e-6,
            warmup_epochs=10,
            schedule="cosine_epoch",
            paramwise={"ndim<=1": {"weight_decay": 0.0, "lars_exclude": True}},
        ),
        speed=Speed(micro_batch=32),
        log=Log(knn_epochs=20, probe=True),
        sync_bn=True,
    )
