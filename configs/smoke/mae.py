"""MAE on CIFAR-10 in about a minute on two CPU cores: timm's smallest ViT, 600 steps.

    fastssl train configs/smoke/mae.py

fastssl: kNN (k=20) 33.2 %, the untrained network 28.7 % (docs/results.md).
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import mae


def get_config() -> Run:
    return Run(
        method=mae.Config(decoder_dim=64, decoder_depth=2, decoder_heads=2),
        backbone=Backbone("test_vit"),
        data=Data(
            train="data/cifar10_train.beton", bank="data/cifar10_test.beton", views=views.mae(64, **views.CIFAR10)
        ),
        optim=Optim(name="adamw", lr=2e-3, batch=64, steps=600, warmup_epochs=0.01, weight_decay=1e-4),
        log=Log(every=20, checkpoint_epochs=0, knn_epochs=1),
    )
