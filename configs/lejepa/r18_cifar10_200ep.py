"""LeJEPA, ResNet-18, CIFAR-10, 200 epochs.
Four views that all count alike and the settings of the authors' minimal example, with a ResNet.
deepspeed --num_gpus 1 fastssl/train.py configs/lejepa/r18_cifar10_200ep.py
Not measured yet."""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import lejepa


def get_config() -> Run:
    return Run(
        method=lejepa.Config(dims=(2048, 2048, 16), weight=0.02, directions=256, end=3.0, large=4),
        backbone=Backbone("resnet18", stem="cifar"),
        data=Data(train="data/cifar10_train.beton", test="data/cifar10_test.beton",
                  views=views.byol(32, blur=(0.5, 0.5), solarize=(0.2, 0.2), interpolation="bicubic",
                                   **views.CIFAR10) * 2),
        optim=Optim(name="adamw", lr=2e-3, batch=256, epochs=200, warmup_epochs=1, weight_decay=5e-2, lr_end=1e-3,
                    precision="bf16"),
        log=Log(knn_epochs=20, probe=True),
        sync_bn=True,
    )
