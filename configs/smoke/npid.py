"""NPID on CIFAR-10 in about a minute on two CPU cores: a thin ResNet-10, 400 steps.

    fastssl train configs/smoke/npid.py

fastssl: kNN (k=20) 32.0 %, the untrained network 29.7 % (docs/results.md).
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import npid


def get_config() -> Run:
    return Run(
        method=npid.Config(dims=(64,), negatives=1024, ensure_neg=True),
        backbone=Backbone("resnet10", stem="cifar", width=8),
        data=Data(
            train="data/cifar10_train.beton", bank="data/cifar10_test.beton", views=views.npid(32, **views.CIFAR10)
        ),
        optim=Optim(name="adamw", lr=2e-3, batch=64, steps=400, warmup_epochs=0.01, weight_decay=1e-4),
        log=Log(every=20, checkpoint_epochs=0, knn_epochs=1),
    )
