"""ODC on CIFAR-10 in about a minute on two CPU cores: a thin ResNet-10, 390 steps after one clustering pass.

The views are crops and flips only: with the colour jitter of the full recipe, labels given by an untrained network
change at random for many epochs.

    fastssl train configs/smoke/odc.py

fastssl: kNN (k=20) 37.5 %, the untrained network 29.7 % (docs/results.md).
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import odc


def get_config() -> Run:
    return Run(
        method=odc.Config(clusters=50, dims=(128, 64)),
        backbone=Backbone("resnet10", stem="cifar", width=8),
        data=Data(
            train="data/cifar10_train.beton",
            bank="data/cifar10_test.beton",
            views=views.supervised(32, scale=(0.3, 1.0), **views.CIFAR10),
        ),
        optim=Optim(
            name="sgd",
            lr=0.3,
            batch=256,
            steps=390,
            warmup_epochs=0.01,
            weight_decay=1e-4,
            paramwise={"^head": {"momentum": 0.0}},
        ),
        log=Log(every=20, checkpoint_epochs=0, knn_epochs=1),
    )
