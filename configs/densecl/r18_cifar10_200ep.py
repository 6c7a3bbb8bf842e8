"""DenseCL, ResNet-18, CIFAR-10, 200 epochs.

solo-learn's MoCo recipe with the dense loss on the last feature map (4 x 4) and a constant momentum (in solo-learn it
rises to 0.999).

    deepspeed --num_gpus 1 fastssl/train.py configs/densecl/r18_cifar10_200ep.py

Published: none.
fastssl: not measured yet.
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import densecl


def get_config() -> Run:
    return Run(
        method=densecl.Config(temperature=0.2, dims=(2048, 256), queue=32768, momentum=0.99),
        backbone=Backbone("resnet18", stem="cifar"),
        data=Data(
            train="data/cifar10_train.beton",
            test="data/cifar10_test.beton",
            views=views.moco_v2(32, scale=(0.08, 1.0), interpolation="bicubic", **views.CIFAR10),
        ),
        optim=Optim(
            name="sgd",
            lr=0.3,
            base_batch=256,
            batch=256,
            epochs=200,
            warmup_epochs=10,
            weight_decay=1e-4,
            precision="fp16",
        ),
        log=Log(knn_epochs=20, probe=True),
        sync_bn=True,
    )
