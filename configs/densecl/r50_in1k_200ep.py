"""DenseCL, ResNet-50, ImageNet, 200 epochs.

Follows the authors' config in WXinlong/DenseCL.

    deepspeed --num_gpus 8 fastssl/train.py configs/densecl/r50_in1k_200ep.py

Published: VOC07+12 detection 58.7 AP (the authors' README); linear 63.5 top-1 (MMSelfSup's model zoo).
fastssl: not measured yet.
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import densecl


def get_config() -> Run:
    return Run(
        method=densecl.Config(init="openselfsup", temperature=0.2, dims=(2048, 128), dense_weight=0.5),
        backbone=Backbone("resnet50", init="fan_in"),
        data=Data(train="data/in1k_train.beton", test="data/in1k_val.beton", views=views.moco_v2(224)),
        optim=Optim(name="sgd", lr=0.03, batch=256, epochs=200, weight_decay=1e-4, schedule="cosine_epoch"),
        log=Log(knn_epochs=20, probe=True),
    )
