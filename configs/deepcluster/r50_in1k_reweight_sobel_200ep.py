"""DeepCluster, ResNet-50, ImageNet, Sobel stem, loss weights instead of uniform sampling, 200 epochs.

OpenSelfSup's recipe with loss weights instead of uniform sampling. Its code has this option, and none of its configs
uses it.

    deepspeed --num_gpus 8 fastssl/train.py configs/deepcluster/r50_in1k_reweight_sobel_200ep.py

Published: none (without the weights 46.92: r50_in1k_sobel_200ep.py).
fastssl: not measured yet.
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import deepcluster


def get_config() -> Run:
    return Run(
        method=deepcluster.Config(sampling="all", reweight=0.5),
        backbone=Backbone("resnet50", init="fan_in", sobel=True),
        data=Data(train="data/in1k_train.beton", test="data/in1k_val.beton", views=views.deepcluster(224)),
        optim=Optim(
            name="sgd",
            lr=0.1,
            batch=512,
            epochs=200,
            weight_decay=1e-5,
            schedule="constant",
            paramwise={"^head": {"momentum": 0.0}},
        ),
        log=Log(knn_epochs=20, probe=True),
    )
