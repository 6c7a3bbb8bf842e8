"""The settings of a run as dataclasses.  `checks.validate` checks that values have the annotated types.

`Data` and `Optim` change results; `Speed` does not (tests/test_engine.py), but for the statistics of batch norm, which
depend on `micro_batch`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from fastssl.config.bounds import (
    BelowOne,
    Count,
    Fraction,
    NonNegative,
    NonNegativeOrNone,
    Positive,
    PositiveInt,
    PositiveIntOrNone,
)

Precision = Literal["fp32", "bf16", "fp16"]

# Kernel, stride and padding of a ResNet's first convolution; only "imagenet" has a max-pool after it.  "cifar_pad2" is
# solo-learn's; "cifar_norelu" has no ReLU after its norm, as lightly's nn.Sequential(*ResNetGenerator().children()).
STEMS = {"imagenet": (7, 2, 3), "cifar": (3, 1, 1), "cifar_pad2": (3, 1, 2), "cifar_norelu": (3, 1, 1)}


@dataclass
class Backbone:
    name: str = "resnet50"  # torchvision ResNet family, or any timm model
    stem: Literal["imagenet", "cifar", "cifar_pad2", "cifar_norelu"] = "imagenet"  # of a ResNet; see STEMS
    norm: Literal["bn", "gn", "frozen"] = "bn"  # "frozen": batch norm with the statistics and scales of `pretrained`
    width: PositiveInt = 64  # channels of the first stage (torchvision ResNets)
    zero_init_residual: bool = False
    init: Literal["fan_out", "fan_in"] = "fan_out"  # Kaiming mode of a ResNet's convolutions; "fan_in": OpenSelfSup's
    in_channels: PositiveInt = 3
    sobel: bool = False  # the input is two gradients of the gray image instead of its colours (ResNets)
    frozen: Count = 0  # stages with the weights and statistics of `pretrained`: 1 is the stem, 2 also the first stage
    pretrained: str | None = None  # file, run folder, "torchvision" or "timm"
    options: dict = field(default_factory=dict)  # more arguments of timm.create_model: {"drop_path_rate": 0.1}


@dataclass
class Data:
    train: str = ""  # .beton to pretrain on
    test: str | None = None  # labelled .beton: queries of the kNN monitor and the probe
    bank: str | None = None  # labelled .beton whose features are the kNN bank; None: the training file
    views: tuple = ()  # recipe: tuple of fastssl.kernels.augment.View
    eval_view: Any = None  # View for evaluation; None: centre crop at the size of view 0


@dataclass
class Optim:
    name: Literal["sgd", "adamw", "lars"] = "sgd"
    lr: Positive = 0.03
    batch: PositiveInt = 256  # global: all ranks and micro-batches together
    epochs: PositiveInt = 200
    steps: PositiveIntOrNone = None  # stop after so many optimizer steps instead of `epochs`
    momentum: BelowOne = 0.9
    betas: tuple[NonNegative, NonNegative] = (0.9, 0.999)
    eps: NonNegative = 1e-8
    weight_decay: NonNegative = 1e-4
    weight_decay_end: NonNegativeOrNone = None  # cosine to this over the run (ViT recipes); None: constant
    # "cosine_epoch": constant within an epoch (OpenSelfSup)
    schedule: Literal["cosine", "cosine_epoch", "step", "constant"] = "cosine"
    warmup_epochs: NonNegative = 0.0  # linear, per step
    warmup_ratio: Fraction = 1e-4  # lr of the first step, divided by lr
    lr_end: Fraction = 0.0  # lr at the end of the cosine, divided by lr
    milestones: tuple[NonNegative, ...] = ()  # epochs at which "step" multiplies by gamma
    gamma: NonNegative = 0.1
    base_batch: PositiveIntOrNone = None  # linear scaling: the lr used is lr * batch / base_batch
    dampening: NonNegative = 0.0
    nesterov: bool = False
    eta: NonNegative = 1e-3  # LARS: trust coefficient (solo-learn: 0.02)
    clip_lr: bool = False  # LARS: a tensor's lr is min(trust ratio, lr) (solo-learn)
    # LARS: |g| + wd |w|; "larc": + 1e-8 (apex, SwAV, MMSelfSup, solo-learn); "sum": |g + wd w| (SimCLR, BYOL, MoCo v3,
    # Barlow Twins, VICReg of their authors)
    lars_denominator: Literal["openselfsup", "larc", "sum"] = "openselfsup"
    lr_in_momentum: bool = True  # LARS: lr inside the momentum buffer (OpenSelfSup), or outside (solo-learn)
    precision: Precision = "fp32"  # of the network; normalisation and statistics are in fp32
    # the residual stream of timm's vision transformers; False: in `precision`.  Statistics of norms are in fp32
    residual_in_fp32: bool = True
    clip: NonNegative = 0.0  # largest gradient norm; 0: not clipped
    clip_each: bool = False  # clip the gradient of every tensor separately (DINO)
    # steps in a row with NaN or infinite gradients that are skipped before the run stops; 0: it stops (docs/runs.md)
    skip_nonfinite: Count = 0
    # regular expression -> options; see optim.group_parameters
    paramwise: dict[str, dict] = field(default_factory=dict)


@dataclass
class Speed:
    zero: Literal[0, 1, 2, 3] = 0  # ZeRO stage
    micro_batch: PositiveIntOrNone = None  # images per rank and forward pass; None: all of the rank's part of the batch
    workers: PositiveIntOrNone = None  # decoding threads per rank; None: the node's cores, divided by its ranks
    resident: bool = False  # keep the decoded training set on the device
    channels_last: bool = True
    compile: Literal["auto", "on", "off"] = "auto"  # the forward by torch.compile; "auto": where it has been measured
    graph: Literal["auto", "on", "off"] = "auto"  # the step as a CUDA graph; "auto": where it has been measured
    kernels: Literal["auto", "reference", "triton"] = "auto"  # "auto": Triton's on CUDA devices


@dataclass
class Log:
    root: str = "work_dirs"  # the run folder is root/<config path>
    every: PositiveInt = 50  # steps between printed lines
    keep: int = 2  # newest checkpoints kept; -1: all
    keep_every: NonNegative = 0  # epochs between checkpoints that are kept beside the newest; 0: none
    checkpoint_epochs: NonNegative = 10  # epochs between checkpoints; 0: only at the end
    checkpoint_steps: PositiveIntOrNone = None  # optimizer steps between checkpoints, instead of epochs
    knn_epochs: Count = 0  # epochs between kNN evaluations; 0: never
    probe: bool = False  # online linear probe
    collapse_every: Count = 50  # steps between collapse measures; 0: never
    tensorboard: bool = True


@dataclass
class Run:
    method: Any  # a method's Config
    backbone: Backbone = field(default_factory=Backbone)
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    speed: Speed = field(default_factory=Speed)
    log: Log = field(default_factory=Log)
    hooks: tuple = ()  # monitors beside those of `log`; see hooks.py
    seed: Count = 0
    deterministic: bool = False
    sync_bn: bool = False
    timeout_s: NonNegative = 1800.0  # seconds without a step after which a run counts as hanging and ends; 0: never
    deepspeed: dict = field(default_factory=dict)  # settings of DeepSpeed, which override ours
    name: str = ""  # set by load(): the run folder below log.root
