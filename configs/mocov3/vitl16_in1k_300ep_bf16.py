"""MoCo v3, ViT-L/16, ImageNet, batch 4096, 300 epochs, bf16.

The recipe of facebookresearch/moco-v3's CONFIG.md for ViT-B (lr 2.4e-3), as MMSelfSup has it for ViT-L, where
gradients are clipped at 5.0.

    deepspeed --num_gpus 8 fastssl/train.py configs/mocov3/vitl16_in1k_300ep_bf16.py

Published: none by the authors; fine-tuned 83.7 top-1 (MMSelfSup's model zoo).
fastssl: not measured yet.
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import mocov3


def get_config() -> Run:
    return Run(
        method=mocov3.Config(
            temperature=0.2, dims=(4096, 4096, 256), predictor_norm=True, momentum=0.99, freeze_patch_embed=True
        ),
        backbone=Backbone("vit_large_patch16_224"),
        data=Data(
            train="data/in1k_train.beton", test="data/in1k_val.beton", views=views.byol(224, interpolation="bilinear")
        ),
        optim=Optim(
            name="adamw",
            lr=1.5e-4,
            batch=4096,
            epochs=300,
            weight_decay=0.1,
            base_batch=256,
            warmup_epochs=40,
            warmup_ratio=0.0,
            clip=5.0,
            precision="bf16",
        ),
        log=Log(knn_epochs=20, probe=True),
        sync_bn=True,
    )
