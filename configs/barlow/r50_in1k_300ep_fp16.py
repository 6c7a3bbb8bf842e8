"""Barlow Twins, ResNet-50, ImageNet, batch 2048, 300 epochs, fp16.

Follows facebookresearch/barlowtwins's main.py, for 300 epochs instead of 1000. On W GPUs the authors' gradients are
1/W of the exact ones, and ours are exact. Their rate of 0.024 for biases and norms and their weight decay of 1e-6 are
therefore converted for W = 16, the number of GPUs of their run: 0.024 / 16 and 16e-6.

    deepspeed --num_gpus 8 fastssl/train.py configs/barlow/r50_in1k_300ep_fp16.py

Published: none by the authors for 300 epochs (linear 73.5 top-1 after 1000: their README); linear 71.8 top-1 at these
settings (MMSelfSup's model zoo).
fastssl: not measured yet.
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import barlow


def get_config() -> Run:
    return Run(
        method=barlow.Config(dims=(8192, 8192, 8192), redundancy=0.0051),
        backbone=Backbone("resnet50", zero_init_residual=True),
        data=Data(train="data/in1k_train.beton", test="data/in1k_val.beton", views=views.byol(224)),
        optim=Optim(
            name="lars",
            lr=1.6,
            batch=2048,
            epochs=300,
            weight_decay=1.6e-5,
            warmup_epochs=10,
            warmup_ratio=0.0,
            lr_end=1e-3,
            lr_in_momentum=False,
            lars_denominator="sum",
            precision="fp16",
            paramwise={"ndim<=1": {"lr_mult": 0.0015, "weight_decay": 0.0, "lars_exclude": True}},
        ),
        log=Log(knn_epochs=20, probe=True),
        sync_bn=True,
    )
