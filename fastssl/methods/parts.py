"""Parts that several methods use: projection heads, prototypes, momentum encoders, multi-crop, statistics of the global
batch, shuffling over ranks.

Shapes: n samples of this rank, V views, D features, K prototypes.
"""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as td
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl import dist, zero
from fastssl.backbones import positions
from fastssl.kernels import Impl, multi_tensor

RELU = partial(nn.ReLU, inplace=True)


def mlp(
    *dims: int,
    norm: bool = True,
    last_norm: bool = False,
    bias: bool = True,
    last_bias: bool = True,
    last_affine: bool = True,
    act: Callable[[], nn.Module] = RELU,
) -> nn.Sequential:
    """Linear layers of the widths `dims` with the activation `act` between them.

    `norm`: batch norm before each activation; `last_norm`: also after the last layer (`last_affine`: with scale and
    shift).  `bias`: of the linear layers; `last_bias`: of the last one.
    """
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(itertools.pairwise(dims)):
        last = i == len(dims) - 2
        layers.append(nn.Linear(a, b, bias=last_bias if last else bias))
        if last_norm if last else norm:
            layers.append(nn.BatchNorm1d(b, affine=last_affine if last else True))
        if not last:
            layers.append(act())
    return nn.Sequential(*layers)


def projector(*dims: int, norm: bool, last_affine: bool = True) -> nn.Sequential:
    """SimCLR's projector: with `norm`, batch norm after every linear layer, none of which has a bias; without, an
    MLP."""
    return mlp(*dims, norm=norm, last_norm=norm, bias=not norm, last_bias=not norm, last_affine=last_affine)


def kaiming_(module: nn.Module) -> None:
    """Initialise linear layers as OpenSelfSup's heads and necks: Kaiming (fan_in, normal), zero bias."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def frozen_copy(*modules: nn.Module) -> nn.Sequential:
    """An nn.Sequential of copies of `modules`, without gradients: the initial momentum encoder."""
    return copy.deepcopy(nn.Sequential(*modules)).requires_grad_(False)


def disable_drop_path_(target: nn.Module) -> None:
    """Disable stochastic depth in a teacher, as in DINO."""
    for module in target.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0


@torch.no_grad()
def ema_(
    target: nn.Module,
    online: list[nn.Module],
    momentum: float | Tensor,
    *,
    found_inf: Tensor | None = None,
    impl: Impl = "auto",
) -> None:
    """target <- momentum * target + (1 - momentum) * online, for parameters; the target has its own batch-norm buffers.

    momentum: a number or a 0-dim tensor.  found_inf: see kernels.multi_tensor.

    Under ZeRO-3 each rank updates its own shards: target and online are partitioned alike, so nothing is communicated.
    (If they were gathered, the update would be lost without an error.)
    """
    old = [getattr(p, "ds_tensor", p) for p in target.parameters()]
    new = [getattr(p, "ds_tensor", p) for module in online for p in module.parameters()]
    assert len(old) == len(new), (len(old), len(new))
    multi_tensor.lerp_([p.data for p in old], [p.data for p in new], 1 - momentum, found_inf=found_inf, impl=impl)


@torch.no_grad()
def assign_(target: Tensor, value: Tensor, found_inf: Tensor | None) -> None:
    """target <- value, unless `found_inf` is nonzero (see kernels.multi_tensor)."""
    target.copy_(value if found_inf is None else torch.where(found_inf != 0, target, value))


def cosine(start: float, end: float, progress: float | Tensor) -> float | Tensor:
    """Cosine schedule from `start` (progress 0) to `end` (progress 1), as for BYOL's momentum.  A `progress` that is a
    0-dim float64 tensor gives a 0-dim tensor."""
    if start == end:
        return end
    if isinstance(progress, Tensor):
        return end - (end - start) * (torch.cos(math.pi * progress) + 1) / 2
    return end - (end - start) * (math.cos(math.pi * progress) + 1) / 2


def mean_cosine(p: Tensor, z: Tensor) -> Tensor:
    """Mean cosine similarity of corresponding rows of p and z."""
    return F.cosine_similarity(p, z, dim=-1).mean()


def view_classification(logits: Tensor) -> dict[str, Tensor]:
    """Cross entropy and accuracy of logits (n, V, V), where the label of each view is its index."""
    n, count, _ = logits.shape
    logits, labels = logits.flatten(0, 1), torch.arange(count, device=logits.device).repeat(n)
    correct = (logits.detach().argmax(1) == labels).float().mean()
    return {"loss": F.cross_entropy(logits, labels), "top1": correct}


def multi_crop(module: nn.Module, views: list[Tensor], large_crops: int) -> Tensor:
    """(n, V, D) outputs of `module` for views of several sizes, the first `large_crops` of which are the large ones.

    Consecutive views of equal size are one batch, with common batch statistics, as in SwAV.
    """
    if len(views) < max(large_crops, 2) or len({x.shape for x in views[:large_crops]}) > 1:
        raise ValueError(
            f"data.views gives {len(views)} views of {[x.shape[-1] for x in views]} pixels, but this method needs at "
            f"least {max(large_crops, 2)} views, the first {large_crops} of equal size: change data.views or "
            "method.large_crops"
        )
    out = []
    for _, same_size in itertools.groupby(views, key=lambda x: x.shape[-1]):
        group = list(same_size)
        out.append(module(torch.cat(group)).unflatten(0, (len(group), -1)))
    return torch.cat(out).transpose(0, 1)


def standardize(z: Tensor, eps: float = 1e-5) -> Tensor:
    """Batch norm without scale and shift over the samples of all ranks (as many on each), with exact gradients."""
    z = z - dist.mean(z.mean(0))
    return z * (dist.mean(z.square().mean(0)) + eps).rsqrt()


def off_diagonal(c: Tensor) -> Tensor:
    """(n, n) -> (n (n - 1),): the off-diagonal entries."""
    n = len(c)
    return c.flatten()[:-1].view(n - 1, n + 1)[:, 1:].flatten()


class Prototypes(nn.Module):
    """Dot products with K prototypes, which are unit vectors: (..., D) -> (..., K).

    weight_norm: True normalises the weights in forward (DINO, solo-learn's SwAV); with False the method calls
    `normalize_` after each step, which overwrites the weights (the original SwAV).
    """

    def __init__(self, dim: int, count: int, weight_norm: bool = True):
        super().__init__()
        self.weight_norm = weight_norm
        self.weight = nn.Parameter(random_directions(count, dim))

    def forward(self, x: Tensor, frozen: bool = False) -> Tensor:
        """`frozen`: the weights get a gradient of zero, not none: ZeRO reduces every parameter on every step."""
        weight = self.directions()
        return F.linear(x, weight.detach() + 0.0 * weight if frozen else weight)

    def directions(self) -> Tensor:
        return F.normalize(self.weight, dim=1) if self.weight_norm else self.weight

    @torch.no_grad()
    def normalize_(self, found_inf: Tensor | None = None) -> None:
        """Normalise the weights, also the optimizer's copy under ZeRO, unless `found_inf` is nonzero."""
        with zero.gathered([self.weight]):
            unit = F.normalize(self.weight, dim=1)
            if found_inf is not None:
                unit = torch.where(found_inf != 0, self.weight, unit)
        zero.overwrite_(self.weight, unit)


def vision_transformer(backbone: nn.Module) -> nn.Module:
    """timm's model in `backbone`; ValueError unless it is a vision transformer with one table of position
    embeddings."""
    body = getattr(backbone, "body", None)
    if not all(hasattr(body, name) for name in ("patch_embed", "pos_embed", "blocks")):
        raise ValueError(
            f"backbone.name={backbone.spec.name!r} is not a vision transformer; "
            "use one of timm's, such as 'vit_small_patch16_224'"
        )
    return body


@torch.no_grad()
def fixed_positions_(body: nn.Module, *, columns_first: bool) -> None:
    """Set a vision transformer's position embeddings to fixed sines and cosines (0 for its class token)."""
    rows, columns = body.patch_embed.grid_size
    table = positions.sincos(rows, columns, body.embed_dim, columns_first=columns_first)
    prefix = body.pos_embed.shape[1] - rows * columns
    body.pos_embed.copy_(F.pad(table, (0, 0, prefix, 0))[None])
    body.pos_embed.requires_grad_(False)


def require_labels(method: str, classes: list | None) -> int:
    """The number of classes; ValueError without labels."""
    if not classes:
        raise ValueError(
            f"method {method!r} needs labels, but data.train has none: convert a labelled source, or choose a method "
            "that needs no labels"
        )
    return len(classes)


def check_queue(queue: int, batch: int) -> None:
    """ValueError for a queue that cannot hold the embeddings of one step."""
    if batch > queue:
        raise ValueError(
            f"method.queue={queue} is smaller than optim.batch={batch}: "
            f"each step would overwrite its own rows; set method.queue to at least {batch}"
        )


def random_directions(*shape: int) -> Tensor:
    """Random unit vectors, the initial values of a queue."""
    return F.normalize(torch.randn(*shape), dim=-1)


def warn_unshuffled(backbone: nn.Module) -> None:
    """Warn that shuffled batch norm has no effect on one rank, where all keys are in one batch."""
    if dist.world() == 1 and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in backbone.modules()):
        warnings.warn(
            "method.shuffle=True has no effect on one GPU: batch statistics can reveal which key belongs to a query, "
            "which may reduce accuracy. Use several GPUs or backbone.norm='gn'; method.shuffle=False silences this "
            "warning",
            stacklevel=2,
        )


class Shuffle:
    """Shuffled batch norm (MoCo): sends each rank's samples to all ranks, as many to each, and the outputs back, so
    that batch statistics do not reveal which key belongs to a query.  Each of W ranks sends n (W-1)/W samples (n (W-1)
    with an all-gather)."""

    def __init__(self, n: int, device: torch.device):
        if n % dist.world():
            raise ValueError(
                f"shuffled batch norm sends equal parts of {n} samples to {dist.world()} ranks: make the images per "
                f"rank (optim.batch / ranks, or speed.micro_batch) a multiple of {dist.world()}, or set "
                "method.shuffle=False"
            )
        self.order = torch.randperm(n, device=device)

    def shuffle(self, x: Tensor) -> Tensor:
        return x if dist.world() == 1 else _exchange(x[self.order])

    def unshuffle(self, x: Tensor) -> Tensor:
        if dist.world() == 1:
            return x
        out = torch.empty_like(x)
        out[self.order] = _exchange(x)
        return out


def _exchange(x: Tensor) -> Tensor:
    # Its own inverse, as all splits are equal: chunk j of rank i and chunk i of rank j are swapped.
    x = x.contiguous()
    out = torch.empty_like(x)
    td.all_to_all_single(out, x)
    return out
