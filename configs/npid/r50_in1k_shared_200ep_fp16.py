"""NPID, ResNet-50, ImageNet, one set of negatives a step, fp16, 200 epochs.

OpenSelfSup's recipe with one set of 65536 negatives for the whole batch instead of one for each sample.

    deepspeed --num_gpus 8 fastssl/train.py configs/npid/r50_in1k_shared_200ep_fp16.py

Published: none (with negatives for each sample 56.60: r50_in1k_200ep.py).
fastssl: not measured yet.
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import npid


def get_config() -> Run:
    return Run(
        method=npid.Config(init="openselfsup", ensure_neg=True, shared=True),
        backbone=Backbone("resnet50", init="fan_in"),
        data=Data(train="data/in1k_train.beton", test="data/in1k_val.beton", views=views.npid(224)),
        optim=Optim(
            name="sgd",
            lr=0.03,
            batch=256,
            epochs=200,
            weight_decay=1e-4,
            schedule="step",
            milestones=(120, 160),
            precision="fp16",
        ),
        log=Log(knn_epochs=20, probe=True),
        sync_bn=True,
    )
