"""SimCLR, ResNet-18, CIFAR-10, 200 epochs.

solo-learn's recipe for 1000 epochs, shortened to 200. Its stem pads by 2, ours by 1 (backbone.stem=cifar_pad2 gives
theirs).

    deepspeed --num_gpus 1 fastssl/train.py configs/simclr/r18_cifar10_200ep.py

Published: none for 200 epochs of this recipe; online linear 90.74 top-1 after 1000 epochs (solo-learn's README); kNN
84.8 after 200 epochs of another recipe with batch 512 (lightly's benchmarks).
fastssl: kNN (k=20) 78.1 after 100 and 82.0 after 160 epochs at 40,600 images/s, with speed.resident=True
speed.compile=on on one H200, torch 2.11.0, triton 3.6.0, 2026-11-27, commit a40d4a5; after 200 epochs not measured
yet.
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import simclr


def get_config() -> Run:
    return Run(
        method=simclr.Config(temperature=0.2, dims=(2048, 256), norm=False),
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
