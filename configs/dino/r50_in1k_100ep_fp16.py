"""DINO, ResNet-50, ImageNet, 2 x 224 + 8 x 96, 100 epochs, fp16.

Follows the ResNet-50 run in facebookresearch/dino's README and main_dino.py.

    deepspeed --num_gpus 8 fastssl/train.py configs/dino/r50_in1k_100ep_fp16.py

Published: none for 100 epochs (linear 75.3 and kNN 67.5 top-1 after the authors' long run: their README).
fastssl: not measured yet.
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import dino


def get_config() -> Run:
    return Run(
        method=dino.Config(),
        backbone=Backbone("resnet50"),
        data=Data(
            train="data/in1k_train.beton",
            test="data/in1k_val.beton",
            views=views.dino(224, scale=(0.14, 1.0), small_scale=(0.05, 0.14)),
        ),
        optim=Optim(
            name="sgd",
            lr=0.03,
            batch=512,
            epochs=100,
            weight_decay=1e-4,
            base_batch=256,
            warmup_epochs=10,
            warmup_ratio=0.0,
            lr_end=1.7e-5,
            clip=3.0,
            clip_each=True,
            paramwise={"ndim<=1": {"weight_decay": 0.0}},
            precision="fp16",
        ),
        log=Log(knn_epochs=20, probe=True),
        sync_bn=True,
    )
