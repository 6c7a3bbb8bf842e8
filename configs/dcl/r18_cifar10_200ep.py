"""DCL, ResNet-18, CIFAR-10, 200 epochs.

solo-learn's SimCLR recipe with the decoupled loss.

    deepspeed --num_gpus 1 fastssl/train.py configs/dcl/r18_cifar10_200ep.py

Published: none for this recipe; kNN 84.0 after 200 epochs of lightly's with batch 512 (lightly's benchmarks).
fastssl: not measured yet.
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import dcl


def get_config() -> Run:
    return Run(
        method=dcl.Config(temperature=0.2, dims=(2048, 256), norm=False),
        backbone=Backbone("resnet18", stem="cifar"),
        data=Data(
            train="data/cifar10_train.beton",
            test="data/cifar10_test.beton",
            views=views.simclr(32, interpolation="bicubic", **views.CIFAR10),
        ),
        optim=Optim(
            name="lars",
            lr=0.4,
            base_batch=256,
            batch=256,
            epochs=200,
            warmup_epochs=10,
            weight_decay=1e-4,
            precision="fp16",
            eta=0.02,
            clip_lr=True,
            lars_denominator="larc",
            lr_in_momentum=False,
            paramwise={"ndim<=1": {"weight_decay": 0.0, "lars_exclude": True}},
        ),
        log=Log(knn_epochs=20, probe=True),
        sync_bn=True,
    )
