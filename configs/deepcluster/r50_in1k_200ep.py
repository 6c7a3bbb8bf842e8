"""DeepCluster, ResNet-50, ImageNet, colour images, 200 epochs.

OpenSelfSup's recipe without Sobel, not the authors' (AlexNet and VGG-16, with Sobel).

    deepspeed --num_gpus 8 fastssl/train.py configs/deepcluster/r50_in1k_200ep.py
    deepspeed --num_gpus 8 fastssl/train.py configs/deepcluster/r50_in1k_200ep.py optim.precision=fp16

Published: none (OpenSelfSup published its run with Sobel filters only).
fastssl: not measured yet.
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import deepcluster


def get_config() -> Run:
    return Run(
        method=deepcluster.Config(),
        backbone=Backbone("resnet50", init="fan_in"),
        data=Data(train="data/in1k_train.beton", test="data/in1k_val.beton", views=views.deepcluster(224)),
        optim=Optim(
            name="sgd",
            lr=0.3,
            batch=512,
            epochs=200,
            weight_decay=1e-5,
            schedule="constant",
            paramwise={"^head": {"momentum": 0.0}},
        ),
        log=Log(knn_epochs=20, probe=True),
    )
