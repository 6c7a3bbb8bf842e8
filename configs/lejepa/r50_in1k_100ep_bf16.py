"""LeJEPA, ResNet-50, ImageNet, 2 x 224 + 6 x 96, 100 epochs, bf16.

After rbalestr-lab/lejepa's README and code, which do not fix batch, warm-up, projector and lambda. Its local views
have 98 pixels.

    deepspeed --num_gpus 8 fastssl/train.py configs/lejepa/r50_in1k_100ep_bf16.py

Published: none for ResNet-50.
fastssl: not measured yet.
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import lejepa


def get_config() -> Run:
    return Run(
        method=lejepa.Config(t_max=3.0),
        backbone=Backbone("resnet50"),
        data=Data(
            train="data/in1k_train.beton",
            test="data/in1k_val.beton",
            views=views.dino(
                224,
                small_crops=6,
                scale=(0.3, 1.0),
                small_scale=(0.05, 0.3),
                blur=0.5,
                solarize=0.2,
                interpolation="bilinear",
            ),
        ),
        optim=Optim(
            name="adamw",
            lr=5e-4,
            batch=512,
            epochs=100,
            weight_decay=5e-4,
            warmup_epochs=10,
            lr_end=1e-3,
            precision="bf16",
        ),
        log=Log(knn_epochs=20, probe=True),
        sync_bn=True,
    )
