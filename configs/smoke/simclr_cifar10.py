"""SimCLR on CIFAR-10 on two CPU cores: a thin ResNet-10, 12 epochs.

    DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 deepspeed --num_gpus 2 fastssl/train.py configs/smoke/simclr_cifar10.py

fastssl: kNN (k=20) on the 10,000 test images 55.1 %; normalised pixels 45.7 %, untrained network 31.2 %. Two cores of
an AMD EPYC, torch 2.11.0, CIFAR-10 as JPEG files, 2026-11-23. The machine was shared, so no time is given.
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import simclr


def get_config() -> Run:
    return Run(
        method=simclr.Config(temperature=0.2, dims=(512, 128)),
        backbone=Backbone("resnet10", stem="cifar", width=16),
        data=Data(
            train="data/cifar10_train.beton", test="data/cifar10_test.beton", views=views.simclr(32, **views.CIFAR10)
        ),
        optim=Optim(name="adamw", lr=3e-3, batch=512, epochs=12, warmup_epochs=1, weight_decay=1e-4, precision="bf16"),
        log=Log(every=20, checkpoint_epochs=2, knn_epochs=4, probe=True),
    )
