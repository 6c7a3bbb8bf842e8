"""LeJEPA, ResNet-18, CIFAR-10, 200 epochs.

Follows rbalestr-lab/lejepa's MINIMAL.md, which trains a ViT on Imagenette for 800 epochs: four views with equal
weight. The weight decay is the one that its README gives for ResNets.

    deepspeed --num_gpus 1 fastssl/train.py configs/lejepa/r18_cifar10_200ep.py

Published: none for CIFAR-10.
fastssl: not measured yet.
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import lejepa


def get_config() -> Run:
    return Run(
        method=lejepa.Config(dims=(2048, 2048, 16), sigreg_weight=0.02, directions=256, t_max=3.0, large_crops=4),
        backbone=Backbone("resnet18", stem="cifar"),
        data=Data(
            train="data/cifar10_train.beton",
            test="data/cifar10_test.beton",
            views=views.simclr(32, solarize=0.2, **views.CIFAR10) * 2,
        ),
        optim=Optim(
            name="adamw",
            lr=2e-3,
            batch=256,
            epochs=200,
            warmup_epochs=1,
            warmup_ratio=0.01,
            weight_decay=5e-4,
            lr_end=0.5,
            precision="bf16",
        ),
        log=Log(knn_epochs=20, probe=True),
        sync_bn=True,
    )
