"""DCL, ResNet-50, ImageNet, batch 256, 200 epochs, fp16.

OpenSelfSup's SimCLR recipe with the decoupled loss. We found no code by the authors for ImageNet.

    deepspeed --num_gpus 8 fastssl/train.py configs/dcl/r50_in1k_200ep_fp16.py

Published: none for these settings; linear 68.2 top-1 for this batch and length with tuned ones (the paper), 65.1
after 100 epochs (lightly's benchmarks).
fastssl: not measured yet.
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import dcl


def get_config() -> Run:
    return Run(
        method=dcl.Config(temperature=0.1, dims=(2048, 128)),
        backbone=Backbone("resnet50"),
        data=Data(train="data/in1k_train.beton", test="data/in1k_val.beton", views=views.simclr(224)),
        optim=Optim(
            name="lars",
            lr=0.3,
            batch=256,
            epochs=200,
            weight_decay=1e-6,
            warmup_epochs=10,
            schedule="cosine_epoch",
            paramwise={"ndim<=1": {"weight_decay": 0.0, "lars_exclude": True}},
            precision="fp16",
        ),
        log=Log(knn_epochs=20, probe=True),
        sync_bn=True,
    )
