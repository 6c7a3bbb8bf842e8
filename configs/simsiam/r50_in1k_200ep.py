"""SimSiam, ResNet-50, ImageNet, 200 epochs.

Follows facebookresearch/simsiam's main_simsiam.py, with a batch of 256 instead of 512 at the learning rate for 256.

    deepspeed --num_gpus 8 fastssl/train.py configs/simsiam/r50_in1k_200ep.py

Published: none in the authors' README for 200 epochs; linear 69.8 top-1 (MMSelfSup's model zoo).
fastssl: not measured yet.
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import simsiam


def get_config() -> Run:
    return Run(
        method=simsiam.Config(),
        backbone=Backbone("resnet50", zero_init_residual=True),
        data=Data(train="data/in1k_train.beton", test="data/in1k_val.beton", views=views.moco_v2(224)),
        optim=Optim(
            name="sgd",
            lr=0.05,
            batch=256,
            epochs=200,
            weight_decay=1e-4,
            schedule="cosine_epoch",
            paramwise={r"^predictor": {"schedule": "constant"}},
        ),
        log=Log(knn_epochs=20, probe=True),
        sync_bn=True,
    )
