"""DINO, ViT-S/16, ImageNet, 2 x 224 + 8 x 96, 100 epochs, bf16.

Follows the vanilla run in facebookresearch/dino's README and main_dino.py (fp16 there). The authors' runs of 300
epochs raise the teacher's temperature to 0.07 over 30 epochs.

    deepspeed --num_gpus 8 fastssl/train.py configs/dino/vits16_in1k_100ep_bf16.py

Published: linear 74.0 and kNN 69.3 top-1 (the authors' README).
fastssl: not measured yet.
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import dino


def get_config() -> Run:
    return Run(
        method=dino.Config(),
        backbone=Backbone("vit_small_patch16_224", options={"drop_path_rate": 0.1}),
        data=Data(train="data/in1k_train.beton", test="data/in1k_val.beton", views=views.dino(224)),
        optim=Optim(
            name="adamw",
            lr=5e-4,
            batch=512,
            epochs=100,
            weight_decay=0.04,
            base_batch=256,
            weight_decay_end=0.4,
            warmup_epochs=10,
            warmup_ratio=0.0,
            lr_end=1e-3,
            clip=3.0,
            clip_each=True,
            paramwise={"ndim<=1": {"weight_decay": 0.0}},
            precision="bf16",
        ),
        log=Log(knn_epochs=20, probe=True),
    )
