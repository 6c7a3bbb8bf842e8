"""SimSiam, ResNet-18, CIFAR-10, 200 epochs.

solo-learn's recipe for 1000 epochs, shortened to 200. Its stem pads by 2, ours by 1 (backbone.stem=cifar_pad2 gives
theirs).

    deepspeed --num_gpus 1 fastssl/train.py configs/simsiam/r18_cifar10_200ep.py

Published: none for 200 epochs of this recipe; online linear 90.51 top-1 after 1000 epochs (solo-learn's README); kNN
76.4 after 200 epochs of another recipe with batch 512 (lightly's benchmarks).
fastssl: not measured yet.
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import simsiam


def get_config() -> Run:
    return Run(
        method=simsiam.Config(),
        backbone=Backbone("resnet18", stem="cifar"),
        data=Data(
            train="data/cifar10_train.beton",
            test="data/cifar10_test.beton",
            views=views.moco_v2(32, scale=(0.08, 1.0), interpolation="bicubic", **views.CIFAR10),
        ),
        optim=Optim(
            name="sgd",
            lr=0.5,
            base_batch=256,
            batch=256,
            epochs=200,
            warmup_epochs=10,
            weight_decay=1e-5,
            precision="fp16",
            paramwise={r"^predictor": {"schedule": "constant"}},
        ),
        log=Log(knn_epochs=20, probe=True),
        sync_bn=True,
    )
