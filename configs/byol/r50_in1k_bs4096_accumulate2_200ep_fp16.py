"""BYOL, ResNet-50, ImageNet, batch 4096 as 8 x 2 x 256, 200 epochs, fp16.

OpenSelfSup's recipe, not the authors'.

    deepspeed --num_gpus 8 fastssl/train.py configs/byol/r50_in1k_bs4096_accumulate2_200ep_fp16.py

Published: linear 71.61 top-1 on the last stage, VOC07 SVM 85.86 mAP (OpenSelfSup's MODEL_ZOO.md).
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
            epochs=200,
            weight_decay=1e-6,
            warmup_epochs=10,
            schedule="cosine_epoch",
            paramwise={"ndim<=1": {"weight_decay": 0.0, "lars_exclude": True}},
            precision="fp16",
        ),
        speed=Speed(micro_batch=256),
        log=Log(knn_epochs=20, probe=True),
        sync_bn=True,
    )
