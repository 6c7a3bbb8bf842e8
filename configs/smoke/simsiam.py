"""SimSiam on CIFAR-10 in about a minute on two CPU cores: a thin ResNet-10, 150 steps.

    fastssl train configs/smoke/simsiam.py

fastssl: kNN (k=20) 36.4 %, the untrained network 31.2 % (docs/results.md).
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import simsiam


def get_config() -> Run:
    return Run(
        method=simsiam.Config(dims=(256, 256, 256), predictor_dim=64),
        backbone=Backbone("resnet10", stem="cifar", width=16),
        data=Data(
            train="data/cifar10_train.beton", bank="data/cifar10_test.beton", views=views.moco_v2(32, **views.CIFAR10)
        ),
        optim=Optim(
            name="adamw",
            lr=2e-3,
            batch=64,
            steps=150,
            warmup_epochs=0.01,
            weight_decay=1e-4,
            paramwise={r"^predictor": {"schedule": "constant"}},
        ),
        log=Log(every=20, checkpoint_epochs=0, knn_epochs=1),
    )
