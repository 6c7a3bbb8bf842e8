"""The pieces that several methods share: projection heads, prototypes, the momentum encoder, multi-crop, statistics of
the global batch, shuffling over ranks.

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
from fastssl.kernels import multi_tensor

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
    """Linear layers of the widths `dims` with `act` between them; `norm` puts batch norm before each activation,
    `last_norm` one after the last layer (`last_affine`: with scale and shift)."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(itertools.pairwise(dims)):
        last = i == len(dims) - 2
        layers.append(nn.Linear(a, b, bias=last_bias if last else bias))
        if last_norm if last else norm:
            layers.append(nn.BatchNorm1d(b, affine=last_affine if last else True))
        if not last:
            layers.append(act())
    return nn.Sequential(*layers)


def kaiming_(module: nn.Module) -> None:
    """OpenSelfSup's initialisation of heads and necks: Kaiming (fan_in, normal) and no bias in the linear layers."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def frozen_copy(*modules: nn.Module) -> nn.Sequential:
    """A momentum encoder: a copy of the modules, in sequence, without gradients."""
    return copy.deepcopy(nn.Sequential(*modules)).requires_grad_(False)


def without_drop_path(target: nn.Module) -> None:
    """Switch drop path off in a teacher, as in DINO."""
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
    impl: str = "auto",
) -> None:
    """target <- momentum * target + (1 - momentum) * online, parameters only (batch-norm buffers are the target's own).

    momentum: a number or a 0-dim tensor; `found_inf` as in kernels.multi_tensor.

    Under ZeRO-3 each rank moves its own shards: both sides are partitioned alike, so nothing is communicated
    (gathering them instead discards the update silently).
    """
    ours = [getattr(p, "ds_tensor", p) for p in target.parameters()]
    theirs = [getattr(p, "ds_tensor", p) for module in online for p in module.parameters()]
    assert len(ours) == len(theirs), (len(ours), len(theirs))
    multi_tensor.lerp_([p.data for p in ours], [p.data for p in theirs], 1 - momentum, found_inf=found_inf, impl=impl)


@torch.no_grad()
def assign_(target: Tensor, value: Tensor, found_inf: Tensor | None) -> None:
    """target <- value, unless `found_inf` (as in kernels.multi_tensor) is not zero."""
    target.copy_(value if found_inf is None else torch.where(found_inf != 0, target, value))


def cosine(start: float, end: float, progress: float | Tensor) -> float | Tensor:
    """Half a cosine from `start` (progress 0) to `end` (progress 1): BYOL's momentum schedule.  `progress` may be a
    0-dim float64 tensor, and the result then is one."""
    if start == end:
        return end
    if isinstance(progress, Tensor):
        return end - (end - start) * (torch.cos(math.pi * progress) + 1) / 2
    return end - (end - start) * (math.cos(math.pi * progress) + 1) / 2


def mean_cosine(p: Tensor, z: Tensor) -> Tensor:
    """Mean cosine similarity of the rows of p with those of z."""
    return F.cosine_similarity(p, z, dim=-1).mean()


def multi_crop(module: nn.Module, views: list[Tensor], large: int) -> Tensor:
    """(n, V, D) of views of mixed sizes, of which the first `large` are the large ones; views of one size that follow
    each other run as one batch (and share batch statistics, as in SwAV)."""
    if len(views) < max(large, 2) or len({x.shape for x in views[:large]}) > 1:
        raise ValueError(
            f"data.views gives views of {[x.shape[-1] for x in views]} pixels: "
            f"needed are at least {max(large, 2)}, the first {large} of one size"
        )
    out = []
    for _, group in itertools.groupby(views, key=lambda x: x.shape[-1]):
        group = list(group)
        out.append(module(torch.cat(group)).unflatten(0, (len(group), -1)))
    return torch.cat(out).transpose(0, 1)


def standardize(z: Tensor, eps: float = 1e-5) -> Tensor:
    """Batch norm without scale and shift over the samples of all ranks (equally many on each), with exact gradients."""
    z = z - dist.mean(z.mean(0))
    return z * (dist.mean(z.square().mean(0)) + eps).rsqrt()


def off_diagonal(c: Tensor) -> Tensor:
    """The off-diagonal entries of a square matrix, as a vector."""
    n = len(c)
    return c.flatten()[:-1].view(n - 1, n + 1)[:, 1:].flatten()


class Prototypes(nn.Module):
    """Dot products with K directions of unit length: (..., D) -> (..., K).

    weight_norm: weights are normalised in forward (DINO, solo-learn's SwAV).  Else `normalize_` brings the weights
    themselves to unit length after each step (the original SwAV).
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
        """Bring the weights to unit length, also in the optimizer's copy (ZeRO), unless `found_inf` is not zero."""
        with zero.gathered([self.weight]):
            unit = F.normalize(self.weight, dim=1)
            if found_inf is not None:
                unit = torch.where(found_inf != 0, self.weight, unit)
        zero.overwrite_(self.weight, unit)


def vision_transformer(backbone: nn.Module) -> nn.Module:
    """timm's model inside `backbone`, or an error if it is not a vision transformer with one table of positions."""
    body = getattr(backbone, "body", None)
    if not all(hasattr(body, name) for name in ("patch_embed", "pos_embed", "blocks")):
        raise ValueError(
            f"backbone.name={backbone.spec.name!r} is not a vision transformer; "
            "use one of timm's, such as 'vit_small_patch16_224'"
        )
    return body


@torch.no_grad()
def fixed_positions_(body: nn.Module, *, columns_first: bool) -> None:
    """Write sine-cosine positions to a vision transformer and freeze them; those of its class token are 0."""
    rows, columns = body.patch_embed.grid_size
    table = positions.sincos(rows, columns, body.embed_dim, columns_first=columns_first)
    prefix = body.pos_embed.shape[1] - rows * columns
    body.pos_embed.copy_(F.pad(table, (0, 0, prefix, 0))[None])
    body.pos_embed.requires_grad_(False)


def require_labels(method: str, classes: list | None) -> int:
    """The number of classes; ValueError without labels."""
    if not classes:
        raise ValueError(
            f"{method} learns from labels and data.train has no classes: convert a labelled source, "
            "or choose a method that needs none"
        )
    return len(classes)


def check_queue(queue: int, batch: int) -> None:
    if batch > queue:
        raise ValueError(
            f"method.queue={queue} is smaller than optim.batch={batch}: "
            f"a step would overwrite its own rows; raise method.queue to at least {batch}"
        )


def random_directions(*shape: int) -> Tensor:
    """Random unit vectors, the initial values of a queue."""
    return F.normalize(torch.randn(*shape), dim=-1)


def warn_unshuffled(backbone: nn.Module) -> None:
    """With one rank all keys are in one batch, and shuffling has no effect."""
    if dist.world() == 1 and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in backbone.modules()):
        warnings.warn(
            "method.shuffle=True has no effect on one GPU: batch norm's statistics can tell which key is "
            "that of a query, and accuracy may suffer; use more GPUs or backbone.norm='gn' "
            "(method.shuffle=False: accept it)",
            stacklevel=2,
        )


class Shuffle:
    """Shuffled batch norm (MoCo): distributes each rank's samples evenly over all ranks and back, so that batch
    statistics do not show which key belongs to a query.  Sends n (W-1)/W samples per rank (an all-gather: n (W-1))."""

    def __init__(self, n: int, device: torch.device):
        if n % dist.world():
            raise ValueError(
                f"shuffled batch norm deals {n} samples to {dist.world()} ranks: "
                f"make optim.batch (or speed.micro_batch) a multiple of {dist.world()} per rank"
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
    # Equal splits make this its own inverse: chunk j of rank i and chunk i of rank j change places.
    x = x.contiguous()
    out = torch.empty_like(x)
    td.all_to_all_single(out, x)
    return out
