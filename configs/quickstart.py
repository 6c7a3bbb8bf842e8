"""SimCLR on scikit-learn's 1,797 handwritten digits, which `make quickstart` trains: a thin ResNet-10, 16-pixel views.

    fastssl quickstart

fastssl: nearest neighbour with one label per class 88.4 %, raw pixels 64.2 %. Two cores of an AMD EPYC, torch 2.11.0,
2026-11-27. Temperature and length were chosen on the same digits: this is a demonstration, not a benchmark.
"""

from fastssl import views
from fastssl.config import Backbone, Data, Log, Optim, Run, Speed
from fastssl.methods import simclr


def get_config() -> Run:
    # Digits have no mirror images and no colour: the views crop, turn, and change brightness, contrast and sharpness.
    recipe = views.simclr(
        16,
        scale=(0.3, 1.0),
        flip=0.0,
        rotate=20.0,
        jitter=(0.4, 0.4, 0.0, 0.0),
        gray=0.0,
        blur=0.3,
        blur_sigma=(0.1, 1.0),
    )
    return Run(
        method=simclr.Config(temperature=0.5, dims=(256, 64)),
        backbone=Backbone("resnet10", stem="cifar", width=16),
        data=Data(
            train="data/digits_train.beton",
            test="data/digits_test.beton",
            views=recipe,
            eval_view=views.center(16, 16)[0],
        ),
        optim=Optim(name="adamw", lr=3e-3, batch=256, epochs=80, warmup_epochs=4, weight_decay=1e-4),
        speed=Speed(resident=True),
        log=Log(every=25, checkpoint_epochs=0, knn_epochs=20),
    )
