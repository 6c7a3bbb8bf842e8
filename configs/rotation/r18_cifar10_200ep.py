"""Rotation prediction, ResNet-18, CIFAR-10, 200 epochs.

Follows gidariss/FeatureLearningRotNet's config for CIFAR-10 with another network (network in network there). Each
image is in the batch in all four rotations.

    deepspeed --num_gpus 1 fastssl/train.py configs/rotation/r18_cifar10_200ep.py

Published: none for ResNet-18.
fastssl: not measured yet.
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import rotation


def get_config() -> Run:
    return Run(
        method=rotation.Config(),
        backbone=Backbone("resnet18", stem="cifar"),
        data=Data(
            train="data/cifar10_train.beton",
            test="data/cifar10_test.beton",
            views=views.rotation(32, crop="random", pad=4, **views.CIFAR10),
        ),
        optim=Optim(
            name="sgd",
            lr=0.1,
            batch=128,
            epochs=200,
            weight_decay=5e-4,
            nesterov=True,
            schedule="step",
            milestones=(60, 120, 160),
            gamma=0.2,
        ),
        log=Log(knn_epochs=20, probe=True),
        sync_bn=True,
    )
