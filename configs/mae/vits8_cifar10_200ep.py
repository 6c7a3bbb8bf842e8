"""MAE, ViT-S/8 on 64-pixel views, CIFAR-10, 200 epochs.

Our own settings: timm has no smaller network, so the views are enlarged to 64 pixels, which makes 64 patches of 8
pixels.

    deepspeed --num_gpus 1 fastssl/train.py configs/mae/vits8_cifar10_200ep.py

Published: none.
fastssl: not measured yet.
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import mae


def get_config() -> Run:
    return Run(
        method=mae.Config(decoder_dim=256, decoder_depth=4, decoder_heads=8),
        backbone=Backbone("vit_small_patch8_224"),
        data=Data(
            train="data/cifar10_train.beton", test="data/cifar10_test.beton", views=views.mae(64, **views.CIFAR10)
        ),
        optim=Optim(
            name="adamw",
            lr=1.5e-4,
            base_batch=256,
            batch=1024,
            epochs=200,
            warmup_epochs=20,
            weight_decay=0.05,
            betas=(0.9, 0.95),
            precision="bf16",
            paramwise={"ndim<=1": {"weight_decay": 0.0}},
        ),
        log=Log(knn_epochs=20, probe=True),
    )
