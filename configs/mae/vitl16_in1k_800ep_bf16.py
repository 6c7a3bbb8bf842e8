"""MAE, ViT-L/16, ImageNet, batch 4096, 800 epochs, bf16.

Follows facebookresearch/mae's PRETRAIN.md and main_pretrain.py (lr 2.4e-3). The paper's best result is for 1600
epochs.

    deepspeed --num_gpus 8 fastssl/train.py configs/mae/vitl16_in1k_800ep_bf16.py

Published: fine-tuned 85.5 top-1 (the authors' PRETRAIN.md; 85.9 after 1600 epochs).
fastssl: not measured yet.
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import mae


def get_config() -> Run:
    return Run(
        method=mae.Config(),
        backbone=Backbone("vit_large_patch16_224"),
        data=Data(train="data/in1k_train.beton", test="data/in1k_val.beton", views=views.mae(224)),
        optim=Optim(
            name="adamw",
            lr=1.5e-4,
            batch=4096,
            epochs=800,
            weight_decay=0.05,
            base_batch=256,
            warmup_epochs=40,
            warmup_ratio=0.0,
            betas=(0.9, 0.95),
            paramwise={"ndim<=1": {"weight_decay": 0.0}},
            precision="bf16",
        ),
        log=Log(knn_epochs=20, probe=True),
    )
