"""DINO on CIFAR-10 in about a minute on two CPU cores: a thin ResNet-10, 150 steps.

    fastssl train configs/smoke/dino.py

fastssl: kNN (k=20) 36.4 %, the untrained network 31.2 % (docs/results.md).
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import dino


def get_config() -> Run:
    return Run(
        method=dino.Config(prototypes=64, dims=(256, 64), momentum=0.9, freeze_epochs=0),
        backbone=Backbone("resnet10", stem="cifar", width=16),
        data=Data(
            train="data/cifar10_train.beton",
            bank="data/cifar10_test.beton",
            views=views.dino(32, small=16, small_crops=2, **views.CIFAR10),
        ),
        optim=Optim(name="adamw", lr=2e-3, batch=64, steps=150, warmup_epochs=0.01, weight_decay=1e-4),
        log=Log(every=20, checkpoint_epochs=0, knn_epochs=1),
    )
