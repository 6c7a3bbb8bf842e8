"""NPID, ResNet-18, CIFAR-10, 200 epochs.
As in zhirongw/lemniscate.pytorch's cifar.py, but with the cross entropy over 4096 negatives instead of NCE and in fp16.
deepspeed --num_gpus 1 fastssl/train.py configs/npid/r18_cifar10_200ep.py
Not measured yet."""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import npid


def get_config() -> Run:
    return Run(
        method=npid.Config(temperature=0.1, negatives=4096, ensure_neg=True),
        backbone=Backbone("resnet18", stem="cifar"),
        data=Data(train="data/cifar10_train.beton", test="data/cifar10_test.beton",
                  views=views.npid(32, flip=0.0, order=("jitter", "gray", "blur", "solarize"), **views.CIFAR10)),
        optim=Optim(name="sgd", lr=0.03, batch=128, epochs=200, weight_decay=5e-4, schedule="step",
                    milestones=(120, 160), precision="fp16"),
        log=Log(knn_epochs=20, probe=True),
        sync_bn=True,
    )
