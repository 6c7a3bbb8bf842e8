"""SimCLR, ResNet-50, ImageNet, batch 4096 in micro-batches, 200 epochs, fp16.

MMSelfSup's recipe, not the authors', in micro-batches; the loss has all 8190 negatives of a step, whatever fits on a
GPU.

    deepspeed --num_gpus 8 fastssl/train.py configs/simclr/r50_in1k_bs4096_accumulate_200ep_fp16.py

Published: linear 66.9 top-1 (MMSelfSup's model zoo, without micro-batches).
fastssl: not measured yet.
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run, Speed
from fastssl.methods import simclr


def get_config() -> Run:
    return Run(
        method=simclr.Config(temperature=0.1, dims=(2048, 128)),
        backbone=Backbone("resnet50", zero_init_residual=True),
        data=Data(train="data/in1k_train.beton", test="data/in1k_val.beton", views=views.simclr(224)),
        optim=Optim(
            name="lars",
            lr=4.8,
            lars_denominator="larc",
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
