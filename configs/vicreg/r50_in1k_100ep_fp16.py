"""VICReg, ResNet-50, ImageNet, batch 512, 100 epochs, fp16.

Follows facebookresearch/vicreg: the single-node run of its README, main_vicreg.py, augmentations.py.

    deepspeed --num_gpus 8 fastssl/train.py configs/vicreg/r50_in1k_100ep_fp16.py

Published: none in the authors' README for 100 epochs (73.2 linear after 1000); 63.0 with batch 256 (lightly's
benchmarks).
fastssl: not measured yet.
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import vicreg


def get_config() -> Run:
    return Run(
        method=vicreg.Config(dims=(8192, 8192, 8192)),
        backbone=Backbone("resnet50", zero_init_residual=True),
        data=Data(train="data/in1k_train.beton", test="data/in1k_val.beton", views=views.byol(224)),
        optim=Optim(
            name="lars",
            lr=0.3,
            batch=512,
            epochs=100,
            weight_decay=1e-6,
            base_batch=256,
            warmup_epochs=10,
            warmup_ratio=0.0,
            lr_end=1e-3,
            lr_in_momentum=False,
            lars_denominator="sum",
            precision="fp16",
            paramwise={"ndim<=1": {"weight_decay": 0.0, "lars_exclude": True}},
        ),
        log=Log(knn_epochs=20, probe=True),
        sync_bn=True,
    )
