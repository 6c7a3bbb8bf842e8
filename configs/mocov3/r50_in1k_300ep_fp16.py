"""MoCo v3, ResNet-50, ImageNet, batch 4096, 300 epochs, fp16.

Follows facebookresearch/moco-v3's CONFIG.md and main_moco.py (lr 4.8).

    deepspeed --num_gpus 8 fastssl/train.py configs/mocov3/r50_in1k_300ep_fp16.py

Published: linear 72.8 top-1 (the authors' README).
fastssl: not measured yet.
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import mocov3


def get_config() -> Run:
    return Run(
        method=mocov3.Config(temperature=1.0, dims=(4096, 256), momentum=0.99),
        backbone=Backbone("resnet50", zero_init_residual=True),
        data=Data(
            train="data/in1k_train.beton",
            test="data/in1k_val.beton",
            views=views.byol(224, scale=(0.2, 1.0), interpolation="bilinear"),
        ),
        optim=Optim(
            name="lars",
            lr=0.3,
            batch=4096,
            epochs=300,
            weight_decay=1e-6,
            base_batch=256,
            warmup_epochs=10,
            warmup_ratio=0.0,
            lr_in_momentum=False,
            lars_denominator="sum",
            precision="fp16",
            paramwise={"ndim<=1": {"weight_decay": 0.0, "lars_exclude": True}},
        ),
        log=Log(knn_epochs=20, probe=True),
        sync_bn=True,
    )
