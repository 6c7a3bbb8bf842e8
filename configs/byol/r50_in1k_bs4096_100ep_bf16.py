"""BYOL, ResNet-50, ImageNet, batch 4096, 100 epochs, bf16.

Follows deepmind-research's byol/configs/byol.py for 100 epochs: base lr 0.45 for 256 images, weight decay 1e-6,
target momentum 0.99. docs/recipes.md lists the known differences. Batch norm uses the whole batch, 512 images on each
of eight GPUs, as in their code. Where 512 images do not fit, use more GPUs: speed.micro_batch would compute batch
norm over fewer images.

    deepspeed --num_gpus 8 fastssl/train.py configs/byol/r50_in1k_bs4096_100ep_bf16.py

Published: none by the authors for 100 epochs; linear 68.4 top-1 with batch 2048 in micro-batches (solo-learn's
README).
fastssl: not measured yet.
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import byol


def get_config() -> Run:
    return Run(
        method=byol.Config(dims=(4096, 256), momentum=0.99, last_bias=False, init="haiku"),
        backbone=Backbone("resnet50", zero_init_residual=True),
        data=Data(train="data/in1k_train.beton", test="data/in1k_val.beton", views=views.byol(224)),
        optim=Optim(
            name="lars",
            lr=0.45,
            batch=4096,
            epochs=100,
            weight_decay=1e-6,
            base_batch=256,
            warmup_epochs=10,
            warmup_ratio=0.0,
            lr_in_momentum=False,
            lars_denominator="sum",
            precision="bf16",
            paramwise={"ndim<=1": {"weight_decay": 0.0, "lars_exclude": True}},
        ),
        log=Log(knn_epochs=20, probe=True),
        sync_bn=True,
    )
