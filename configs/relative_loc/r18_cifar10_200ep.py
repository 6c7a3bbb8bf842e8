"""Relative location, ResNet-18, CIFAR-10, 200 epochs.

OpenSelfSup's recipe for ImageNet at the size of CIFAR: cells of 11 pixels, patches of 8.

    deepspeed --num_gpus 1 fastssl/train.py configs/relative_loc/r18_cifar10_200ep.py

Published: none.
fastssl: not measured yet.
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import relative_loc


def get_config() -> Run:
    return Run(
        method=relative_loc.Config(hidden=1024),
        backbone=Backbone("resnet18", stem="cifar"),
        data=Data(
            train="data/cifar10_train.beton",
            test="data/cifar10_test.beton",
            views=views.patches(8, resize=36, window=33, **views.CIFAR10),
            eval_view=views.center(32, **views.CIFAR10)[0],
        ),  # whole images, not the size of a patch
        optim=Optim(
            name="sgd",
            lr=0.1,
            batch=256,
            epochs=200,
            weight_decay=1e-4,
            warmup_epochs=5,
            paramwise={r"^head": {"weight_decay": 5e-4}},
        ),
        log=Log(knn_epochs=20, probe=True),
        sync_bn=True,
    )
