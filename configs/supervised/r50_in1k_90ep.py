"""Supervised, ResNet-50, ImageNet, 90 epochs.

OpenSelfSup's recipe, the usual one of 90 epochs.

    deepspeed --num_gpus 8 fastssl/train.py configs/supervised/r50_in1k_90ep.py

Published: none by OpenSelfSup; 76.13 top-1 of torchvision's first weights of this network (torchvision's
documentation).
fastssl: not measured yet.
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import supervised


def get_config() -> Run:
    return Run(
        method=supervised.Config(init="openselfsup"),
        backbone=Backbone("resnet50", init="fan_in"),
        data=Data(train="data/in1k_train.beton", test="data/in1k_val.beton", views=views.supervised(224)),
        optim=Optim(name="sgd", lr=0.1, batch=256, epochs=90, weight_decay=1e-4, schedule="step", milestones=(30, 60)),
        log=Log(knn_epochs=20, probe=True),
        sync_bn=True,
    )
