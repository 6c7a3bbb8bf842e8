"""DeepCluster v2 on CIFAR-10 in a few minutes on two CPU cores: a thin ResNet-10, two epochs, each after clustering.

    fastssl train configs/smoke/deepclusterv2.py

fastssl: kNN (k=20) 32.4 %, the untrained network 29.7 % (docs/results.md).
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import deepclusterv2


def get_config() -> Run:
    return Run(
        method=deepclusterv2.Config(clusters=(100, 200), dims=(256, 64)),
        backbone=Backbone("resnet10", stem="cifar", width=8),
        data=Data(
            train="data/cifar10_train.beton", bank="data/cifar10_test.beton", views=views.simclr(32, **views.CIFAR10)
        ),
        optim=Optim(name="adamw", lr=2e-3, batch=256, steps=390, warmup_epochs=0.01, weight_decay=1e-4),
        log=Log(every=20, checkpoint_epochs=0, knn_epochs=1),
    )
