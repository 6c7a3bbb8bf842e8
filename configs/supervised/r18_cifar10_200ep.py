"""Supervised, ResNet-18, CIFAR-10, 200 epochs.

OpenSelfSup's recipe for 350 epochs (steps at 150 and 250), shortened to 200.

    deepspeed --num_gpus 1 fastssl/train.py configs/supervised/r18_cifar10_200ep.py

Published: none by OpenSelfSup.
fastssl: not measured yet.
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import supervised


def get_config() -> Run:
    return Run(
        method=supervised.Config(),
        backbone=Backbone("resnet18", stem="cifar"),
        data=Data(
            train="data/cifar10_train.beton", test="data/cifar10_test.beton", views=views.padded(32, **views.CIFAR10)
        ),
        optim=Optim(
            name="sgd", lr=0.1, batch=128, epochs=200, weight_decay=5e-4, schedule="step", milestones=(85, 143)
        ),
        log=Log(knn_epochs=20, probe=True),
        sync_bn=True,
    )
