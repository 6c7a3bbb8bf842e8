"""DeepCluster, ResNet-50, ImageNet, Sobel stem, 200 epochs.

OpenSelfSup's recipe, not the authors' (AlexNet and VGG-16).

    deepspeed --num_gpus 8 fastssl/train.py configs/deepcluster/r50_in1k_sobel_200ep.py

Published: linear 46.92 top-1 on pooled features, 57.71 on the third stage, VOC07 SVM 74.26 mAP (OpenSelfSup's
MODEL_ZOO.md).
fastssl: not measured yet.
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import deepcluster


def get_config() -> Run:
    return Run(
        method=deepcluster.Config(),
        backbone=Backbone("resnet50", init="fan_in", sobel=True),
        data=Data(train="data/in1k_train.beton", test="data/in1k_val.beton", views=views.deepcluster(224)),
        optim=Optim(
            name="sgd",
            lr=0.1,
            batch=512,
            epochs=200,
            weight_decay=1e-5,
            schedule="constant",
            paramwise={"^head": {"momentum": 0.0}},
        ),
        log=Log(knn_epochs=20, probe=True),
    )
