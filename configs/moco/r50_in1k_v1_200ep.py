"""MoCo v1, ResNet-50, ImageNet, 200 epochs.

OpenSelfSup's recipe; the second line is its r50_v1_fp16.py.

    deepspeed --num_gpus 8 fastssl/train.py configs/moco/r50_in1k_v1_200ep.py
    deepspeed --num_gpus 8 fastssl/train.py configs/moco/r50_in1k_v1_200ep.py optim.precision=fp16

Published: linear 61.02 top-1, VOC07 SVM 79.18 mAP (OpenSelfSup's MODEL_ZOO.md).
fastssl: not measured yet.
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import moco


def get_config() -> Run:
    return Run(
        method=moco.Config(init="openselfsup", temperature=0.07, dims=(128,)),
        backbone=Backbone("resnet50", init="fan_in"),
        data=Data(train="data/in1k_train.beton", test="data/in1k_val.beton", views=views.moco_v1(224)),
        optim=Optim(
            name="sgd", lr=0.03, batch=256, epochs=200, weight_decay=1e-4, schedule="step", milestones=(120, 160)
        ),
        log=Log(knn_epochs=20, probe=True),
    )
