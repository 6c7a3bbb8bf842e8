"""Rotation prediction, ResNet-50, ImageNet, 128 images in four rotations, 70 epochs.

OpenSelfSup's recipe, not the authors' (AlexNet); the second line is its r50_fp16.py.

    deepspeed --num_gpus 8 fastssl/train.py configs/rotation/r50_in1k_70ep.py
    deepspeed --num_gpus 8 fastssl/train.py configs/rotation/r50_in1k_70ep.py optim.precision=fp16

Published: linear 47.01 top-1 on pooled features, 54.99 on the third stage, VOC07 SVM 67.38 mAP (OpenSelfSup's
MODEL_ZOO.md).
fastssl: not measured yet.
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import rotation


def get_config() -> Run:
    return Run(
        method=rotation.Config(),
        backbone=Backbone("resnet50", init="fan_in"),
        data=Data(train="data/in1k_train.beton", test="data/in1k_val.beton", views=views.rotation(224)),
        optim=Optim(
            name="sgd",
            lr=0.2,
            batch=128,
            epochs=70,
            weight_decay=1e-4,
            warmup_epochs=5,
            warmup_ratio=0.1,
            schedule="step",
            milestones=(30, 50),
        ),
        log=Log(knn_epochs=20, probe=True),
        sync_bn=True,
    )
