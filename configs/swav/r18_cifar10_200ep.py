"""SwAV, ResNet-18, CIFAR-10, 200 epochs.

solo-learn's recipe for 1000 epochs, shortened to 200. Its stem pads by 2, ours by 1 (backbone.stem=cifar_pad2 gives
theirs). Two crops. The queue is used from epoch 10 of 200 (there 50 of 1000).

    deepspeed --num_gpus 1 fastssl/train.py configs/swav/r18_cifar10_200ep.py

Published: none for 200 epochs of this recipe; online linear 89.17 top-1 after 1000 epochs (solo-learn's README); kNN
84.2 after 200 epochs of another recipe with batch 512 (lightly's benchmarks).
fastssl: not measured yet.
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import swav


def get_config() -> Run:
    return Run(
        method=swav.Config(dims=(2048, 128), queue=3840, queue_epoch=10, freeze_epochs=2, weight_norm=True),
        backbone=Backbone("resnet18", stem="cifar"),
        data=Data(
            train="data/cifar10_train.beton",
            test="data/cifar10_test.beton",
            views=views.simclr(32, interpolation="bicubic", **views.CIFAR10),
        ),
        optim=Optim(
            name="lars",
            lr=0.6,
            base_batch=256,
            batch=256,
            epochs=200,
            warmup_epochs=10,
            weight_decay=1e-6,
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
