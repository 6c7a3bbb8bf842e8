"""NPID, ResNet-50, ImageNet, 200 epochs.

OpenSelfSup's recipe, not the authors' (4,096 negatives and NCE in zhirongw/lemniscate.pytorch).

    deepspeed --num_gpus 8 fastssl/train.py configs/npid/r50_in1k_200ep.py

Published: linear 56.60 top-1, VOC07 SVM 74.50 mAP (OpenSelfSup's MODEL_ZOO.md).
fastssl: not measured yet.
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import npid


def get_config() -> Run:
    return Run(
        method=npid.Config(init="openselfsup"),
        backbone=Backbone("resnet50", init="fan_in"),
        data=Data(train="data/in1k_train.beton", test="data/in1k_val.beton", views=views.npid(224)),
        optim=Optim(
            name="sgd", lr=0.03, batch=256, epochs=200, weight_decay=1e-4, schedule="step", milestones=(120, 160)
        ),
        log=Log(knn_epochs=20, probe=True),
        sync_bn=True,
    )
