"""ODC, ResNet-50, ImageNet, 440 epochs.

OpenSelfSup's recipe; its authors are ODC's.

    deepspeed --num_gpus 8 fastssl/train.py configs/odc/r50_in1k_440ep.py
    deepspeed --num_gpus 8 fastssl/train.py configs/odc/r50_in1k_440ep.py optim.precision=fp16

Published: linear 53.42 top-1 on pooled features, 57.70 on the last stage, VOC07 SVM 78.42 mAP (OpenSelfSup's
MODEL_ZOO.md).
fastssl: not measured yet.
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import odc


def get_config() -> Run:
    return Run(
        method=odc.Config(),
        backbone=Backbone("resnet50", init="fan_in"),
        data=Data(train="data/in1k_train.beton", test="data/in1k_val.beton", views=views.deepcluster(224)),
        optim=Optim(
            name="sgd",
            lr=0.06,
            batch=512,
            epochs=440,
            weight_decay=1e-5,
            schedule="step",
            milestones=(400,),
            gamma=0.4,
            paramwise={"^head": {"momentum": 0.0}},
        ),
        log=Log(knn_epochs=20, probe=True),
        sync_bn=True,
    )
