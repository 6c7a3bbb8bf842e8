"""MoCo v2, ResNet-50, ImageNet, 200 epochs, fp16.
OpenSelfSup's recipe, in fp16.
Published: none in fp16 (67.69 in fp32: r50_in1k_v2_200ep.py).
deepspeed --num_gpus 8 fastssl/train.py configs/moco/r50_in1k_v2_200ep_fp16.py
Not measured yet."""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run
from fastssl.methods import moco


def get_config() -> Run:
    return Run(
        method=moco.Config(init="openselfsup", temperature=0.2, dims=(2048, 128)),
        backbone=Backbone("resnet50", init="fan_in"),
        data=Data(train="data/in1k_train.beton", test="data/in1k_val.beton", views=views.moco_v2(224)),
        optim=Optim(
            name="sgd", lr=0.03, batch=256, epochs=200, weight_decay=1e-4, schedule="cosine_epoch", precision="fp16"
        ),
        log=Log(knn_epochs=20, probe=True),
    )
