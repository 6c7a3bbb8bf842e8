"""MoCo v2, ResNet-50, ImageNet, 200 epochs.

OpenSelfSup's recipe.

    deepspeed --num_gpus 8 fastssl/train.py configs/moco/r50_in1k_v2_200ep.py
    deepspeed --num_gpus 8 fastssl/train.py configs/moco/r50_in1k_v2_200ep.py optim.precision=fp16

Published: linear 67.69 top-1, VOC07 SVM 84.26 mAP (OpenSelfSup's MODEL_ZOO.md).
fastssl: not measured yet.
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import moco


def get_config() -> Run:
    return Run(
        method=moco.Config(init="openselfsup", temperature=0.2, dims=(2048, 128)),
        backbone=Backbone("resnet50", init="fan_in"),
        data=Data(train="data/in1k_train.beton", test="data/in1k_val.beton", views=views.moco_v2(224)),
        optim=Optim(name="sgd", lr=0.03, batch=256, epochs=200, weight_decay=1e-4, schedule="cosine_epoch"),
        log=Log(knn_epochs=20, probe=True),
    )
