"""Relative location on CIFAR-10 in about a minute on two CPU cores: a thin ResNet-10, 400 steps.

    fastssl train configs/smoke/relative_loc.py

fastssl: kNN (k=20) 29.4 %, the untrained network 31.2 % (docs/results.md).
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import relative_loc


def get_config() -> Run:
    return Run(
        method=relative_loc.Config(hidden=256),
        backbone=Backbone("resnet10", stem="cifar", width=16),
        data=Data(
            train="data/cifar10_train.beton",
            bank="data/cifar10_test.beton",
            views=views.patches(8, resize=36, window=33, **views.CIFAR10),
            eval_view=views.center(32, **views.CIFAR10)[0],
        ),  # whole images, not the size of a patch
        optim=Optim(name="adamw", lr=2e-3, batch=64, steps=400, warmup_epochs=0.01, weight_decay=1e-4),
        log=Log(every=20, checkpoint_epochs=0, knn_epochs=1),
    )
