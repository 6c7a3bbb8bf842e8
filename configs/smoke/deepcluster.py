"""DeepCluster on CIFAR-10 in about a minute on two CPU cores: a thin ResNet-10, two epochs, each after clustering.

The views are crops and flips only: an untrained network clusters images mainly by colour, which colour jitter would
then hide.

    fastssl train configs/smoke/deepcluster.py

fastssl: kNN (k=20) 33.8 %, the untrained network 29.7 % (docs/results.md).
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import deepcluster


def get_config() -> Run:
    return Run(
        method=deepcluster.Config(clusters=50, pca_dim=32),
        backbone=Backbone("resnet10", stem="cifar", width=8),
        data=Data(
            train="data/cifar10_train.beton",
            bank="data/cifar10_test.beton",
            views=views.supervised(32, scale=(0.3, 1.0), **views.CIFAR10),
        ),
        optim=Optim(
            name="sgd",
            lr=0.1,
            batch=256,
            steps=390,
            warmup_epochs=0.01,
            weight_decay=1e-4,
            paramwise={"^head": {"momentum": 0.0}},
        ),
        log=Log(every=20, checkpoint_epochs=0, knn_epochs=1),
    )
