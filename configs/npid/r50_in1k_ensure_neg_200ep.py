"""NPID, ResNet-50, ImageNet, no negative is the sample itself, 200 epochs.

OpenSelfSup's recipe.

    deepspeed --num_gpus 8 fastssl/train.py configs/npid/r50_in1k_ensure_neg_200ep.py

Published: VOC07 SVM 75.70 mAP (OpenSelfSup's MODEL_ZOO.md); none for ImageNet.
fastssl: not measured yet.
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import npid


def get_config() -> Run:
    return Run(
        method=npid.Config(init="openselfsup", ensure_neg=True),
        backbone=Backbone("resnet50", init="fan_in"),
        data=Data(train="data/in1k_train.beton", test="data/in1k_val.beton", views=views.npid(224)),
        optim=Optim(
            name="sgd", lr=0.03, batch=256, epochs=200, weight_decay=1e-4, schedule="step", milestones=(120, 160)
        ),
        log=Log(knn_epochs=20, probe=True),
        sync_bn=True,
    )
