"""SupCon, ResNet-50, ImageNet, batch 4096, 200 epochs, fp16.

MMSelfSup's SimCLR recipe with labels, not the authors' recipe.

    deepspeed --num_gpus 8 fastssl/train.py configs/supcon/r50_in1k_200ep_fp16.py

Published: none for these settings (79.1 linear with a momentum encoder: HobbitLong/SupContrast's README).
fastssl: not measured yet.
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run, Speed
from fastssl.methods import supcon


def get_config() -> Run:
    return Run(
        method=supcon.Config(temperature=0.1, dims=(2048, 128)),
        backbone=Backbone("resnet50"),
        data=Data(train="data/in1k_train.beton", test="data/in1k_val.beton", views=views.simclr(224)),
        optim=Optim(
            name="lars",
            lr=4.8,
            batch=4096,
            epochs=200,
            weight_decay=1e-6,
            warmup_epochs=10,
            schedule="cosine_epoch",
            paramwise={"ndim<=1": {"weight_decay": 0.0, "lars_exclude": True}},
            precision="fp16",
        ),
        speed=Speed(micro_batch=128),
        log=Log(knn_epochs=20, probe=True),
        sync_bn=True,
    )
