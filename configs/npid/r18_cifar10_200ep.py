"""NPID, ResNet-18, CIFAR-10, 200 epochs.

Follows zhirongw/lemniscate.pytorch's cifar.py with --nce-k 0 --nce-t 0.1, the cross entropy over the whole bank; fp16
here.

    deepspeed --num_gpus 1 fastssl/train.py configs/npid/r18_cifar10_200ep.py

Published: none in the authors' README.
fastssl: not measured yet.
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import npid


def get_config() -> Run:
    return Run(
        method=npid.Config(temperature=0.1, negatives=0),
        backbone=Backbone("resnet18", stem="cifar"),
        data=Data(
            train="data/cifar10_train.beton",
            test="data/cifar10_test.beton",
            views=views.npid(
                32,
                flip=0.0,
                order=("jitter", "gray", "blur", "solarize"),
                mean=(0.4914, 0.4822, 0.4465),
                std=(0.2023, 0.1994, 0.2010),
            ),
        ),
        optim=Optim(
            name="sgd",
            lr=0.03,
            batch=128,
            epochs=200,
            weight_decay=5e-4,
            schedule="step",
            milestones=(120, 160),
            precision="fp16",
        ),
        log=Log(knn_epochs=20, probe=True),
        sync_bn=True,
    )
