"""Rotation prediction on CIFAR-10 in about a minute on two CPU cores: a thin ResNet-10, 150 steps.

    fastssl train configs/smoke/rotation.py

fastssl: kNN (k=20) 40.0 %, the untrained network 31.2 % (docs/results.md).
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import rotation


def get_config() -> Run:
    return Run(
        method=rotation.Config(),
        backbone=Backbone("resnet10", stem="cifar", width=16),
        data=Data(
            train="data/cifar10_train.beton",
            bank="data/cifar10_test.beton",
            views=views.rotation(32, scale=(0.2, 1.0), **views.CIFAR10),
        ),
        optim=Optim(name="adamw", lr=2e-3, batch=64, steps=150, warmup_epochs=0.01, weight_decay=1e-4),
        log=Log(every=20, checkpoint_epochs=0, knn_epochs=1),
    )
