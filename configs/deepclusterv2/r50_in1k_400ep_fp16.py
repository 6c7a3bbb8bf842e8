"""DeepCluster v2, ResNet-50, ImageNet, 2 x 224, batch 4096, 400 epochs, fp16.

Follows facebookresearch/swav's scripts/deepclusterv2_400ep_2x224_pretrain.sh (fp32 there): LARS and weight decay for
all parameters, including norms and biases. Eight GPUs process the batch in eight micro-batches of 64.

    deepspeed --num_gpus 8 fastssl/train.py configs/deepclusterv2/r50_in1k_400ep_fp16.py

Published: linear 70.2 top-1 (the authors' README).
fastssl: not measured yet.
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run, Speed
from fastssl.methods import deepclusterv2


def get_config() -> Run:
    return Run(
        method=deepclusterv2.Config(),
        backbone=Backbone("resnet50"),
        data=Data(
            train="data/in1k_train.beton",
            test="data/in1k_val.beton",
            views=views.simclr(224, std=(0.228, 0.224, 0.225)),
        ),
        optim=Optim(
            name="lars",
            lr=4.8,
            batch=4096,
            epochs=400,
            weight_decay=1e-6,
            warmup_epochs=10,
            warmup_ratio=0.0625,
            lr_end=1e-3,
            lr_in_momentum=False,
            lars_denominator="larc",
            precision="fp16",
        ),
        speed=Speed(micro_batch=64),
        log=Log(knn_epochs=20, probe=True),
        sync_bn=True,
    )
