"""MoCo v3, ResNet-50, ImageNet, batch 4096, 100 epochs, fp16.
The authors' recipe (lr 9.6); weight decay and warm-up not checked against their code.
deepspeed --num_gpus 8 fastssl/train.py configs/mocov3/r50_in1k_100ep_fp16.py
Not measured yet."""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import mocov3


def get_config() -> Run:
    return Run(
        method=mocov3.Config(temperature=1.0, dims=(4096, 256), momentum=0.99),
        backbone=Backbone("resnet50"),
        data=Data(train="data/in1k_train.beton", test="data/in1k_val.beton", views=views.byol(224, scale=(0.2, 1.0))),
        optim=Optim(name="lars", lr=0.6, batch=4096, epochs=100, weight_decay=1.5e-6, base_batch=256,
                    warmup_epochs=10, paramwise={"ndim<=1": {"weight_decay": 0.0, "lars_exclude": True}},
                    precision="fp16"),
        log=Log(knn_epochs=20, probe=True),
        sync_bn=True,
    )
