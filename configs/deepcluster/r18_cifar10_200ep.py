"""DeepCluster, ResNet-18, CIFAR-10, 200 epochs.

OpenSelfSup's recipe for ImageNet with 500 clusters, which gives about as many samples per cluster as there, and
features whitened to 128 dimensions.

    deepspeed --num_gpus 1 fastssl/train.py configs/deepcluster/r18_cifar10_200ep.py

Published: none.
fastssl: not measured yet.
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import deepcluster


def get_config() -> Run:
    return Run(
        method=deepcluster.Config(clusters=500, pca_dim=128),
        backbone=Backbone("resnet18", stem="cifar"),
        data=Data(
            train="data/cifar10_train.beton",
            test="data/cifar10_test.beton",
            views=views.deepcluster(32, **views.CIFAR10),
        ),
        optim=Optim(
            name="sgd",
            lr=0.1,
            batch=256,
            epochs=200,
            weight_decay=1e-5,
            schedule="constant",
            precision="fp16",
            paramwise={"^head": {"momentum": 0.0}},
        ),
        log=Log(knn_epochs=20, probe=True),
        sync_bn=True,
    )
