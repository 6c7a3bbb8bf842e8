"""Relative location, ResNet-50, ImageNet, 70 epochs.

OpenSelfSup's recipe, not the authors' (AlexNet).

    deepspeed --num_gpus 8 fastssl/train.py configs/relative_loc/r50_in1k_70ep.py

Published: linear 38.83 top-1 on pooled features, 49.31 on the third stage, VOC07 SVM 64.78 mAP (OpenSelfSup's
MODEL_ZOO.md).
fastssl: not measured yet.
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import relative_loc


def get_config() -> Run:
    return Run(
        method=relative_loc.Config(),
        backbone=Backbone("resnet50", init="fan_in"),
        data=Data(
            train="data/in1k_train.beton",
            test="data/in1k_val.beton",
            views=views.patches(64),
            eval_view=views.center(224, 256)[0],
        ),  # whole images, not the size of a patch
        optim=Optim(
            name="sgd",
            lr=0.2,
            batch=512,
            epochs=70,
            weight_decay=1e-4,
            warmup_epochs=5,
            warmup_ratio=0.1,
            schedule="step",
            milestones=(30, 50),
            paramwise={r"^head": {"weight_decay": 5e-4}},
        ),
        log=Log(knn_epochs=20, probe=True),
    )
