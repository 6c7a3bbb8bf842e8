"""DINO, ViT-B/16, ImageNet, 2 x 224 + 8 x 96, 100 epochs, bf16.

Follows the run of ViT-B on 16 GPUs in facebookresearch/dino's README and main_dino.py (batch 1024, fp16 there).

    deepspeed --num_gpus 8 fastssl/train.py configs/dino/vitb16_in1k_100ep_bf16.py

Published: none for 100 epochs (linear 78.2 and kNN 76.1 top-1 after the authors' long run: their README).
fastssl: not measured yet.
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import dino


def get_config() -> Run:
    return Run(
        method=dino.Config(),
        backbone=Backbone("vit_base_patch16_224", options={"drop_path_rate": 0.1}),
        data=Data(train="data/in1k_train.beton", test="data/in1k_val.beton", views=views.dino(224)),
        optim=Optim(
            name="adamw",
            lr=5e-4,
            batch=1024,
            epochs=100,
            weight_decay=0.04,
            base_batch=256,
            weight_decay_end=0.4,
            warmup_epochs=10,
            warmup_ratio=0.0,
            lr_end=5e-4,
            clip=3.0,
            clip_each=True,
            paramwise={"ndim<=1": {"weight_decay": 0.0}},
            precision="bf16",
        ),
        log=Log(knn_epochs=20, probe=True),
    )
