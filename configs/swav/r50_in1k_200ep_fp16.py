"""SwAV, ResNet-50, ImageNet, 2 x 224 + 6 x 96, batch 256, 200 epochs, fp16.

Follows facebookresearch/swav's scripts/swav_200ep_bs256_pretrain.sh and main_swav.py: LARS and weight decay for all
parameters, including norms and biases.

    deepspeed --num_gpus 8 fastssl/train.py configs/swav/r50_in1k_200ep_fp16.py

Published: linear 72.7 top-1 (the authors' README).
fastssl: not measured yet.
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import swav


def get_config() -> Run:
    return Run(
        method=swav.Config(prototypes=3000, queue=3840, queue_epoch=15, freeze_epochs=1),
        backbone=Backbone("resnet50"),
        data=Data(
            train="data/in1k_train.beton", test="data/in1k_val.beton", views=views.swav(224, std=(0.228, 0.224, 0.225))
        ),
        optim=Optim(
            name="lars",
            lr=0.6,
            batch=256,
            epochs=200,
            weight_decay=1e-6,
            lr_end=1e-3,
            lr_in_momentum=False,
            lars_denominator="larc",
            precision="fp16",
        ),
        log=Log(knn_epochs=20, probe=True),
        sync_bn=True,
    )
