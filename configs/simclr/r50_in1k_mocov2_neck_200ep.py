"""SimCLR with MoCo v2's projector, ResNet-50, ImageNet, batch 256, 200 epochs.

OpenSelfSup's recipe.

    deepspeed --num_gpus 8 fastssl/train.py configs/simclr/r50_in1k_mocov2_neck_200ep.py

Published: linear 58.00 top-1, VOC07 SVM 77.65 mAP (OpenSelfSup's MODEL_ZOO.md).
fastssl: not measured yet.
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import simclr


def get_config() -> Run:
    return Run(
        method=simclr.Config(init="openselfsup", temperature=0.1, dims=(2048, 128), norm=False),
        backbone=Backbone("resnet50", init="fan_in"),
        data=Data(train="data/in1k_train.beton", test="data/in1k_val.beton", views=views.simclr(224)),
        optim=Optim(
            name="lars",
            lr=0.3,
            batch=256,
            epochs=200,
            weight_decay=1e-6,
            warmup_epochs=10,
            schedule="cosine_epoch",
            paramwise={"ndim<=1": {"weight_decay": 0.0, "lars_exclude": True}},
        ),
        log=Log(knn_epochs=20, probe=True),
        sync_bn=True,
    )
