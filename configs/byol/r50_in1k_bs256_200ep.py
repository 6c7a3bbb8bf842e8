"""BYOL, ResNet-50, ImageNet, batch 256, 200 epochs.

OpenSelfSup's recipe, not the authors'. Known to be weak: BYOL needs a large batch.

    deepspeed --num_gpus 8 fastssl/train.py configs/byol/r50_in1k_bs256_200ep.py

Published: VOC07 SVM 77.95 mAP (a user's run in OpenSelfSup's issue 18); none for ImageNet.
fastssl: not measured yet.
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import byol


def get_config() -> Run:
    return Run(
        method=byol.Config(dims=(4096, 256), momentum=0.996, init="openselfsup"),
        backbone=Backbone("resnet50", init="fan_in"),
        data=Data(train="data/in1k_train.beton", test="data/in1k_val.beton", views=views.byol(224)),
        optim=Optim(
            name="lars",
            lr=0.2,
            batch=256,
            epochs=200,
            weight_decay=1.5e-6,
            warmup_epochs=2,
            schedule="cosine_epoch",
            paramwise={"ndim<=1": {"weight_decay": 0.0, "lars_exclude": True}},
        ),
        log=Log(knn_epochs=20, probe=True),
    )
